"""`retinue doctor`: what this machine gives, what is fast on it and what is not, and why."""

import os
import platform
from argparse import Namespace
from importlib.metadata import PackageNotFoundError, version
from mmap import mmap
from pathlib import Path

from retinue import __version__
from retinue.cli.findings import Finding, fast_paths
from retinue.cli.options import ROOM, config_from, useless
from retinue.cli.terminal import audience, emit_json, note, styled
from retinue.config import ENVIRONMENT_KEYS, ENVIRONMENT_PREFIX, Config, format_size
from retinue.engine.reserve import limits_of
from retinue.errors import CheckpointError, RetinueError, UsageError
from retinue.memory.files import ALIGNMENT, Reader
from retinue.memory.headers import is_stand_in
from retinue.memory.home import locate_headers, sample_folder, weights_near
from retinue.memory.machine import available_bytes, cores, known_speeds
from retinue.policy.presets import preset

SLOW_DISK_BYTES_PER_S = 0.5e9
OF_A_MODEL = (*ROOM, "preset", "precision", "self_check", "eager")
USEFUL_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")


def execute(options: Namespace) -> int:
    """Print the findings; returns 0, or 1 when one of them keeps retinue from working well."""
    config = config_from(options)
    if options.model is None:
        useless(options, OF_A_MODEL, "without a MODEL")
    preset(config.preset)
    folder = locate_headers(options.model, note) if options.model else sample_folder()
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"no weights in `{folder}`", hint="give the folder of a checkpoint")
    checksums = [_checksums(options.model, folder)] if options.verify else []
    findings = [
        *_software(),
        *_processor(config),
        *_memory(),
        *_speeds(weights_near(folder), config),
        *_settings(),
    ]
    if options.model:
        findings += checksums + _model(folder, config)
    out = audience(options.json)
    for finding in findings:
        mark = styled("ok  ", "green", out) if finding.good else styled("!!  ", "red", out)
        print(f"{mark} {finding.name:<18} {finding.value}", file=out)
        if finding.fix:
            print(f"     {'':<18} hint: {finding.fix}", file=out)
    problems = [finding for finding in findings if not finding.good]
    verdict = "everything is as it should be"
    if problems:
        verdict = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    print(f"\n{verdict}", file=out)
    if options.json:
        emit_json(
            {
                "ok": not problems,
                "findings": [
                    {"name": f.name, "value": f.value, "ok": f.good, "fix": f.fix} for f in findings
                ],
            }
        )
    return 1 if problems else 0


def _software() -> list[Finding]:
    found = [Finding("retinue", f"{__version__}, Python {platform.python_version()}")]
    for package in ("torch", "transformers", "safetensors"):
        try:
            found.append(Finding(package, version(package)))
        except PackageNotFoundError:
            fix = f"pip install {package}"
            found.append(Finding(package, "not installed", good=False, fix=fix))
    return found


def _processor(config: Config) -> list[Finding]:
    usable, threads = cores(), config.threads or cores()
    flags = _flags()
    fast = [flag for flag in USEFUL_FLAGS if flag in flags]
    found = [Finding("processor", f"{usable} cores usable, of {os.cpu_count()}; {threads} threads")]
    if flags:
        found.append(Finding("instructions", ", ".join(fast) or "no vector extensions"))
    if flags and not {"avx512_bf16", "amx_bf16"} & flags:
        found.append(
            Finding("bf16", "emulated: prompts compute slowly on this processor", good=True)
        )
    if threads > usable:
        fix = f"use `--threads {usable}`"
        found.append(Finding("threads", f"{threads} on {usable} cores", good=False, fix=fix))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > usable:
        found.append(
            Finding("load", f"{load:.1f}: other programs use the cores, expect less speed")
        )
    return found


def _flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if "flags" in line), set())


def _memory() -> list[Finding]:
    available = available_bytes()
    good = available > 1 << 30
    fix = "" if good else "close other programs, or raise the limit of the control group"
    return [Finding("memory", f"{format_size(available)} available", good=good, fix=fix)]


def _speeds(folder: Path, config: Config) -> list[Finding]:
    """Measure disk, memory and kernels; see whether direct reads work where the checkpoint lies."""
    speeds = known_speeds(folder, fresh=True)
    disk, memory = speeds.disk_bytes_per_s, speeds.memory_bytes_per_s
    slow = disk < SLOW_DISK_BYTES_PER_S
    fix = "put the checkpoint on a local solid-state disk" if slow else ""
    found = [
        Finding("disk", f"{disk / 1e9:.2f} GB/s", good=not slow, fix=fix),
        Finding("memory speed", f"{memory / 1e9:.1f} GB/s"),
    ]
    note = _direct_note(folder)
    fix = "reads go through the page cache, which is slower; use another file system"
    found.append(Finding("direct reads", note or "yes", good=not note, fix=fix if note else ""))
    found += fast_paths(_flags(), speeds, min(config.threads or cores(), cores()))
    return found


def _direct_note(folder: Path) -> str:
    reader = Reader()
    file = next(iter(sorted(folder.glob("*.safetensors"))))
    with memoryview(mmap(-1, ALIGNMENT)) as view:
        reader.read(file, 0, view, direct=True)
    reader.close()
    return reader.note


def _checksums(model: str | None, folder: Path) -> Finding:
    if model is None:
        raise UsageError("--verify needs a MODEL", hint="`retinue doctor PACK --verify`")
    from retinue.engine.packing import damaged

    wrong, count = damaged(folder, lambda done, whole: None)
    if not wrong:
        return Finding("checksums", f"all {count} parts are as they were written")
    value = f"{len(wrong)} of {count} parts are damaged: {wrong[0]}"
    return Finding("checksums", value, good=False, fix=wrong[0].hint)


def _settings() -> list[Finding]:
    names = [ENVIRONMENT_PREFIX + key.upper() for key in ENVIRONMENT_KEYS]
    return [
        Finding("environment", f"{name}={os.environ[name]}") for name in names if name in os.environ
    ]


def _model(folder: Path, config: Config) -> list[Finding]:
    """Whether the model fits and the fast path agrees with the reference."""
    if is_stand_in(folder):
        return _headers(folder, config)
    from retinue.engine.llm import LLM

    try:
        with LLM.from_config(folder, config) as llm:
            facts, split = llm.assembly.facts, llm.assembly.split
            return [
                Finding("family", f"{facts.family}, {facts.dtype}"),
                Finding("precision", f"{config.precision} ({facts.stored or facts.dtype} experts)"),
                Finding("fits", f"{split.slots} of {facts.total_experts} experts resident"),
                Finding("self-check", "passed" if config.self_check else "skipped"),
                # What needs a remedy has a finding of its own above.
                *(Finding("note", text) for text in llm.assembly.notes),
            ]
    except UsageError:
        raise
    except RetinueError as error:
        return [Finding("model", str(error), good=False, fix=error.hint)]


def _headers(folder: Path, config: Config) -> list[Finding]:
    """Whether a model fits whose weights are not here yet."""
    from retinue.model.survey import survey

    try:
        facts = survey(folder, config.precision)
        limits = limits_of(facts, preset(config.preset), config)
    except UsageError:
        raise
    except RetinueError as error:
        return [Finding("model", str(error), good=False, fix=error.hint)]
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return [
        Finding("family", f"{facts.family}, {facts.dtype}"),
        Finding("fits", f"{limits.slots} of {facts.total_experts} experts resident"),
        Finding("weights", f"{format_size(size)}, not downloaded yet"),
        Finding("self-check", "skipped: it needs the weights"),
    ]
