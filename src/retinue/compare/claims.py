"""What each paper claims, in numbers, beside the measure that comes nearest to it here.

`why` says what differs between their setting and ours where results do. Numbers are quoted as the
papers print them, as far as they could be read; where only a digest was at hand it says so.
"""

from dataclasses import dataclass

from retinue.compare.measures import (
    Measure,
    Seen,
    belady_points,
    change,
    loss_added,
    next_gate,
    points,
    times,
    value,
)
from retinue.lab.base import Row

NOT_HERE = "not measured in this run"
ONE_TIER = "one place computes here: what they give to a CPU beside a GPU has no counterpart"
COUPLED = "theirs moves experts over PCIe to a GPU, ours from a disk to the cores that compute"
LOOKUPS = ("hits", "pending", "misses")


@dataclass(frozen=True, slots=True)
class Claim:
    """One number of one paper. `preset`: which of ours it is about; `where`: in the paper."""

    preset: str
    paper: str
    where: str
    said: str
    measure: Measure
    why: str

    def row(self, seen: Seen) -> Row:
        """What was found, flat, for a document and a table."""
        found = self.measure.found(seen)
        row: Row = {"preset": self.preset, "paper": self.paper, "where": self.where}
        row |= {"claim": self.said, "measure": self.measure.words, "why": self.why}
        if found is None:
            return row | {"found": NOT_HERE}
        ends = {"found_median": found.median, "found_low": found.low, "found_high": found.high}
        return row | {"found": self.measure.written(found), **ends}


def rows(seen: Seen) -> list[Row]:
    """All claims, those about presets that did not run too."""
    return [claim.row(seen) for claim in CLAIMS]


_MIXTRAL = "Mixtral-offloading, 2312.17238"
_HOBBIT = "HOBBIT, 2411.01433"
_FMOE = "fMoE (FineMoE), 2502.05370"
_ADAPMOE = "AdapMoE, 2408.10284"
_EXPERTFLOW = "ExpertFlow, 2410.17954"
_PREGATED = "Pre-gated MoE, 2308.12066"
_PROMOE = "ProMoE, 2410.22134"
_CACHE_PRIOR = "cache-conditional experts, 2412.00099"
_INFINITY = "MoE-Infinity, 2401.14361"

CLAIMS = (
    Claim(
        "mixtral-offloading",
        _MIXTRAL,
        "table of ablations",
        "look-ahead by the next gate makes decoding 1.05 (A100) to 1.33 times (T4) as fast",
        times("mixtral-offloading"),
        f"{COUPLED}; reads ahead gain only where the disk would be idle",
    ),
    Claim(
        "auto",
        "AdapMoE, 2408.10284; HOBBIT, 2411.01433; DAOP, 2501.10375",
        "prediction accuracy",
        "the next layer's gate on this layer's input names 84 to 91 % of what is used; top 1: 96 %",
        next_gate(),
        "more experts are chosen of more here than Mixtral's 2 of 8, and the model is shallow",
    ),
    Claim(
        "read-me",
        "Read-ME, 2410.19123",
        "cache hit rates at capacities 2 to 5",
        "Belady's rule hits 5 to 10 points more than recency (44/62/77/88 against 34/52/67/83 %)",
        belady_points(),
        "their router is one for all layers, so that whole paths repeat; ours is replayed over all"
        " layers' own routers",
    ),
    Claim(
        "hobbit",
        _HOBBIT,
        "ablation study",
        "dynamic precision of misses makes decoding 1.19 to 1.57 times as fast",
        times("hobbit"),
        "here with its look-ahead and cache rule; low precision reads fewer bytes, so that it gains"
        " where reads are slow",
    ),
    Claim(
        "hobbit",
        _HOBBIT,
        "ablation study",
        "its cache rule's penalty is 4.7 to 8.7 % below that of recency",
        change("hobbit", "bytes read a token", ("bytes_read",)),
        "penalty counts a low-precision miss as part of one, as bytes do; look-ahead is in it too",
    ),
    Claim(
        "fmoe",
        _FMOE,
        "evaluation, hit rates",
        "hits 68 % more often than MoE-Infinity (39 % in the abstract, over all baselines)",
        change("fmoe", "hits", ("hits",), "moe-infinity"),
        "their store holds 1,000 maps of chats; here it has those of the texts that it was made of",
    ),
    Claim(
        "moe-infinity",
        _INFINITY,
        "evaluation",
        "1.4 times as fast as Mixtral-offloading",
        times("moe-infinity", "mixtral-offloading"),
        "matrices of a few task texts know little of others; recovery takes 30 to 50 requests",
    ),
    Claim(
        "adapmoe",
        _ADAPMOE,
        "abstract",
        "25 % fewer expert activations without loss of accuracy",
        change("adapmoe", "experts looked up", LOOKUPS),
        "Mixtral's second expert of two is dropped where it matters little; of more experts a token"
        " each carries less",
    ),
    Claim(
        "adapmoe",
        _ADAPMOE,
        "abstract",
        "1.35 times as fast",
        times("adapmoe", "mixtral-offloading"),
        COUPLED,
    ),
    Claim(
        "adapmoe",
        _ADAPMOE,
        "abstract",
        "no loss of accuracy",
        loss_added("adapmoe"),
        "loss sees what tasks' accuracy does not",
    ),
    Claim(
        "edgemoe",
        "EdgeMoE, 2308.14352",
        "evaluation",
        "2.6 to 3.3 times as fast as loading on demand",
        times("edgemoe"),
        "Switch models choose one expert a token and its path dictionary names the next; most of"
        " the gain is bit width",
    ),
    Claim(
        "expertflow",
        _EXPERTFLOW,
        "cache 8, batch 16",
        "hits 71.9 % where recency hits 36.2 %",
        points("expertflow"),
        "their 35.7 points are of large batches, where recency thrashes; one sequence repeats more",
    ),
    Claim(
        "promoe",
        _PROMOE,
        "evaluation",
        "decodes 1.31 times as fast as recency",
        times("promoe"),
        f"{COUPLED}; its predictors have 2 M weights a layer there",
    ),
    Claim(
        "promoe",
        _PROMOE,
        "evaluation",
        "prefills 2.21 times as fast as recency",
        times("promoe", phase="prefill"),
        "a prompt uses almost every expert, so that here all exact presets read all of them",
    ),
    Claim(
        "pre-gated",
        _PREGATED,
        "evaluation (digest)",
        "1.5 times the throughput of loading on demand",
        times("pre-gated"),
        "Switch chooses one expert a token, and PCIe moves it while a block computes",
    ),
    Claim(
        "pre-gated",
        _PREGATED,
        "evaluation (digest)",
        "27 times (at most 55) the throughput of prefetching whole layers",
        times("pre-gated", "layer-stream"),
        "up to 256 experts a layer there: the more of them are unused, the more whole layers cost",
    ),
    Claim(
        "se-moe",
        "SE-MoE, 2205.10034; as measured by Pre-gated MoE, 2308.12066",
        "the latter's evaluation (digest)",
        "whole layers in a ring are the slowest at batch 1, by as much as 125 times a block",
        times("se-moe"),
        "the paper's own regime is large batches and prefill, where every expert is used",
    ),
    Claim(
        "d2moe",
        "D2MoE, 2504.15299",
        "evaluation",
        "1.06 to 1.39 times as fast as EdgeMoE",
        times("d2moe", "edgemoe"),
        "their planes are residuals of one bit; the store here has whole steps of precision",
    ),
    Claim(
        "fiddler",
        "Fiddler, 2402.07033",
        "evaluation",
        "1.26 times as fast as the best baseline, mean",
        times("fiddler"),
        ONE_TIER,
    ),
    Claim(
        "hybrimoe",
        "HybriMoE, 2504.05897",
        "cache hit rates with 25 % of the experts",
        "hits 5 to 8 points more than recency (36.2/52.7/52.8 against 30.2/47.7/45.0 %)",
        points("hybrimoe"),
        f"its scores of the cache are as theirs; for the rest, {ONE_TIER}",
    ),
    Claim(
        "freetoken",
        "FreeToken, 2608.16157",
        "evaluation (digest)",
        "1.5 to 2.3 times as fast as the best of four engines",
        times("freetoken"),
        ONE_TIER,
    ),
    Claim(
        "cache-prior",
        _CACHE_PRIOR,
        "abstract and results",
        "half the misses or fewer",
        change("cache-prior", "misses", ("misses", "pending")),
        "their bias is tuned for each model; here it is 0.3 of the range for all",
    ),
    Claim(
        "cache-prior",
        _CACHE_PRIOR,
        "abstract and results",
        "0.1 to 3 % more perplexity",
        loss_added("cache-prior"),
        "loss in nats is the logarithm of perplexity",
    ),
    Claim(
        "daop",
        "DAOP, 2501.10375",
        "evaluation (digest)",
        "84.1 % of predictions by the next gate are right",
        next_gate(),
        "2 of 8 experts there; the more are chosen of the more, the harder to name all",
    ),
    Claim(
        "klotski",
        "Klotski, 2502.06888",
        "evaluation",
        "up to 9.5 times Fiddler's and 19 times MoE-Infinity's throughput, many batches at once",
        times("klotski", "moe-infinity"),
        "one sequence at a time here: there is no other batch whose work could hide a read",
    ),
    Claim(
        "mc-moe-odp",
        "MC-MoE, 2410.06270",
        "online dynamic pruning",
        "12 to 13 % fewer active bytes",
        change("mc-moe-odp", "experts looked up", LOOKUPS),
        "top-2 models lose one expert or none; of k a ratio leaves out the tail",
    ),
    Claim(
        "emoe",
        "eMoE, 2503.06823",
        "accuracy with 20 to 80 % of the experts",
        "93.7 to 99.8 % of the meaning stays",
        value("emoe", "agreement", "agreement with the plain model's next token"),
        "their accuracy is likeness of whole answers' embeddings; agreement of tokens is stricter",
    ),
    Claim(
        "swapmoe",
        "SwapMoE, 2308.15030",
        "abstract",
        "a third of the memory (4.7 of 14.2 GiB) costs 0.041 of Rouge-2",
        loss_added("swapmoe"),
        "Switch models of one expert a token there; Rouge of summaries does not see every token",
    ),
)
