"""Makes learned parts by kind: on four fifths of the texts to judge them, on all to be kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from retinue.model.predictors import kept
from retinue.policy.predict.learned import Part, Worth
from retinue.policy.preset import Arrays
from retinue.policy.watch.expert_maps import DISTANCE
from retinue.trace import TraceHead
from retinue.train import adapmoe, edgemoe, expertflow, hobbit, perceptrons, stores
from retinue.train.descent import Course
from retinue.train.examples import Example, choices, drawn_of
from retinue.train.measures import Measures
from retinue.train.texts import divide
from retinue.train.worth import Flags, judged, top
from retinue.types import FloatArray

# Epochs and learning rate of what descends.
COURSES = {
    "promoe": (10, 3e-3),
    "expertflow": (12, 1e-2),
    "pre-gated": (10, 1e-3),
    "read-me": (10, 3e-3),
}


@dataclass(frozen=True, slots=True)
class Task:
    """What parts are made for. `epochs`: instead of each kind's own; `advance` counts progress."""

    head: TraceHead
    vocabulary: int
    measures: Measures
    seed: int
    epochs: int | None = None
    advance: Callable[[], object] = lambda: None

    @property
    def experts(self) -> int:
        """Of a layer."""
        return self.head.experts

    @property
    def top_k(self) -> int:
        """Of a token."""
        return self.head.top_k

    def course(self, kind: str) -> Course:
        """How `kind` descends."""
        epochs, rate = COURSES[kind]
        return Course(self.epochs or epochs, self.seed, rate, self.advance)


Examples = Sequence[Example]
Maker = Callable[[Task, Examples], Mapping[str, FloatArray]]
Judge = Callable[[Task, Arrays, Examples], Worth]


def ticks(kinds: Sequence[str], epochs: int | None) -> int:
    """How often `advance` is called for `kinds`."""
    return sum(2 * (1 + (epochs or COURSES[kind][0] if kind in COURSES else 0)) for kind in kinds)


def train_parts(task: Task, examples: Examples, kinds: Sequence[str]) -> dict[str, Part]:
    """A part of each of `kinds`, with what it was worth on a fifth of the texts.

    Raises UsageError where a task has too few texts.
    """
    learn, held = divide(examples, task.seed)
    made = {}
    for kind in kinds:
        make, judge = KINDS_MADE[kind]
        worth = judge(task, kept(make(task, learn)), held)
        task.advance()
        made[kind] = Part(kept(make(task, examples)), worth)
        task.advance()
    return made


def baseline(task: Task, examples: Examples) -> Worth:
    """What the most used experts are worth, and the next gate 1 to 3 layers ahead, if known."""
    learn, held = divide(examples, task.seed)
    counts = np.concatenate([choices(one.experts, task.experts) for one in learn]).mean(axis=0)
    needed = _needed(task, held)
    popular = judged(np.broadcast_to(top(counts, task.top_k), needed.shape), needed)
    found = {"popularity": popular["recall"]}
    if task.measures.gates and held[0].hidden.size:
        found |= {f"gate {ahead}": _gate_recall(task, held, ahead) for ahead in (1, 2, 3)}
    return found


def _gate_recall(task: Task, held: Examples, ahead: int) -> tuple[float, ...]:
    """The recall of each row's router on the input of the row `ahead` before; 0 for the first."""
    drawn = drawn_of(held, task.experts)
    named = np.zeros(drawn.chosen.shape, dtype=bool)
    for row in range(ahead, drawn.chosen.shape[1]):
        weights, bias = task.measures.gates[row]
        said = drawn.hidden[:, row - ahead].astype(np.float32) @ weights + bias
        named[:, row] = top(said, task.top_k)
    return judged(named, drawn.chosen)["recall"]


def _needed(task: Task, examples: Examples) -> Flags:
    return np.concatenate([choices(one.experts, task.experts) for one in examples])


def _promoe(task: Task, examples: Examples) -> Mapping[str, FloatArray]:
    return perceptrons.promoe(drawn_of(examples, task.experts), task.course("promoe"))


def _judge_promoe(task: Task, arrays: Arrays, held: Examples) -> Worth:
    drawn = drawn_of(held, task.experts)
    return judged(perceptrons.promoe_names(arrays, drawn, task.top_k), drawn.chosen)


def _read_me(task: Task, examples: Examples) -> Mapping[str, FloatArray]:
    return perceptrons.read_me(drawn_of(examples, task.experts), task.course("read-me"))


def _judge_read_me(task: Task, arrays: Arrays, held: Examples) -> Worth:
    drawn = drawn_of(held, task.experts)
    return judged(perceptrons.read_me_names(arrays, drawn, task.top_k), drawn.chosen)


def _pre_gated(task: Task, examples: Examples) -> Mapping[str, FloatArray]:
    drawn, gates = drawn_of(examples, task.experts), task.measures.gates
    return perceptrons.pre_gated(drawn, task.course("pre-gated"), gates.__getitem__)


def _judge_pre_gated(task: Task, arrays: Arrays, held: Examples) -> Worth:
    drawn = drawn_of(held, task.experts)
    return judged(perceptrons.pre_gated_names(arrays, drawn, task.top_k), drawn.chosen)


def _expertflow(task: Task, examples: Examples) -> Mapping[str, FloatArray]:
    course = task.course("expertflow")
    return expertflow.expertflow(examples, task.vocabulary, task.experts, course)


def _judge_expertflow(task: Task, arrays: Arrays, held: Examples) -> Worth:
    named = expertflow.expertflow_names(arrays, held, task.top_k)
    return judged(named, _needed(task, held))


def _moe_infinity(task: Task, examples: Examples) -> Mapping[str, FloatArray]:
    return stores.moe_infinity(examples, task.experts)


def _judge_moe_infinity(task: Task, arrays: Arrays, held: Examples) -> Worth:
    named, needed = [], []
    for one, said in zip(held, stores.nearest_request(arrays, held), strict=True):
        answer = choices(one.experts[one.prompt_tokens :], task.experts)
        named.append(np.broadcast_to(top(said, task.top_k), answer.shape))
        needed.append(answer)
    return judged(np.concatenate(named), np.concatenate(needed))


def _fmoe(task: Task, examples: Examples) -> Mapping[str, FloatArray]:
    return stores.fmoe(examples, task.seed)


def _judge_fmoe(task: Task, arrays: Arrays, held: Examples) -> Worth:
    distance = min(DISTANCE, arrays["maps"].shape[1])
    said = [top(stores.nearest_map(arrays, one, distance), task.top_k) for one in held]
    return judged(np.concatenate(said), drawn_of(held, task.experts).chosen)


def _adapmoe(task: Task, examples: Examples) -> Mapping[str, FloatArray]:
    accuracy = np.array(_gate_recall(task, examples, 1))
    return adapmoe.adapmoe(examples, task.measures.sensitivity(examples), accuracy)


def _judge_adapmoe(task: Task, arrays: Arrays, held: Examples) -> Worth:
    gone = adapmoe.dropped(adapmoe.tails_of(held), arrays["sensitivity"])
    accuracy = _gate_recall(task, held, 1)
    return {"left out": tuple(gone.tolist()), "accuracy": accuracy}


def _edgemoe(task: Task, examples: Examples) -> Mapping[str, FloatArray]:
    importance, bits = task.measures.bits(examples)
    paths = edgemoe.dictionary(examples, task.experts, task.top_k)
    return {"importance": importance, "bits": bits, **paths}


def _judge_edgemoe(task: Task, arrays: Arrays, held: Examples) -> Worth:
    found = judged(edgemoe.dictionary_names(arrays, held, task.top_k), _needed(task, held))
    added = task.measures.added(held, arrays["bits"].astype(np.int64))
    return {**found, "bits": tuple(arrays["bits"].mean(axis=1).tolist()), "loss added": (added,)}


def _hobbit(task: Task, examples: Examples) -> Mapping[str, FloatArray]:
    return hobbit.hobbit(examples, task.experts)


def _judge_hobbit(task: Task, arrays: Arrays, held: Examples) -> Worth:
    tried = np.concatenate([arrays["weights"][None], hobbit.combinations()[:2]])
    costs = hobbit.penalties(held, task.experts, tried).tolist()
    return dict(zip(("penalty", "by recency", "by use"), ((cost,) for cost in costs), strict=True))


KINDS_MADE: dict[str, tuple[Maker, Judge]] = {
    "promoe": (_promoe, _judge_promoe),
    "expertflow": (_expertflow, _judge_expertflow),
    "moe-infinity": (_moe_infinity, _judge_moe_infinity),
    "fmoe": (_fmoe, _judge_fmoe),
    "pre-gated": (_pre_gated, _judge_pre_gated),
    "read-me": (_read_me, _judge_read_me),
    "adapmoe": (_adapmoe, _judge_adapmoe),
    "edgemoe": (_edgemoe, _judge_edgemoe),
    "hobbit": (_hobbit, _judge_hobbit),
}
