"""What a decoding step costs beside weights and experts, prepared and eager: one JSON line.

A tiny twin of the checkpoint's family has the same operations on hardly any numbers; its experts
are left out. What remains is what every step costs, however small the model.
"""

import json
import statistics
import tempfile
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from retinue import LLM, SamplingParams
from retinue.model.architecture import model_class
from retinue.model.twin import shrink

ROUNDS = 10


def measure(folder: Path, new_tokens: int) -> dict[str, Any]:
    """Microseconds a layer and token, both ways in turn."""
    with tempfile.TemporaryDirectory() as made:
        small = _small(AutoConfig.from_pretrained(folder))
        model_class(small).build(torch.bfloat16).save_pretrained(made)
        layers = int(small.get_text_config().num_hidden_layers)
        settings = {"memory": "2GiB", "context": 16 + new_tokens, "threads": 1}
        with LLM(made, **settings) as ours, LLM(made, eager=True, **settings) as eager:
            found: dict[str, list[float]] = {"prepared_us": [], "eager_us": []}
            for _ in range(ROUNDS):
                found["prepared_us"].append(_layer_us(ours, layers, new_tokens))
                found["eager_us"].append(_layer_us(eager, layers, new_tokens))
            notes = ours.assembly.notes
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {"layers": layers, "new_tokens": new_tokens, "notes": notes, **medians}


def _small(config: PreTrainedConfig) -> PreTrainedConfig:
    """The checkpoint's configuration with small sizes, and with all of its layers."""
    fields = config.get_text_config().to_dict()
    layers = fields["num_hidden_layers"]
    kinds = {
        name: value
        for name, value in fields.items()
        if isinstance(value, list) and len(value) == layers and isinstance(value[0], str)
    }
    return shrink(config, num_hidden_layers=layers, **kinds)


def _layer_us(llm: LLM, layers: int, new_tokens: int) -> float:
    def nothing(layer: int, hidden: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden)

    llm.assembly.host.run = nothing  # type: ignore[method-assign]
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    prompt = [5 + n % 90 for n in range(8)]
    (output,) = llm.generate(prompt, params, progress=False)
    return 1e6 / output.stats.decode_median_tokens_per_s / layers


def main() -> None:
    """Measure the family of the checkpoint that is named."""
    parser = ArgumentParser(prog="python -m benchmarks.step_child", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--new-tokens", type=int, required=True)
    options = parser.parse_args()
    print(json.dumps(measure(options.checkpoint, options.new_tokens)))


if __name__ == "__main__":
    main()
