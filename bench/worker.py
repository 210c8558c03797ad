"""One side of a comparison: holds a model and answers commands, a line of JSON each.

``python -P bench/worker.py engine|vllm FOLDER OPTIONS`` runs in the environment that has the side's
engine, so only the standard library and NumPy are imported before the side is known. Standard
output carries answers alone: whatever else is printed there goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

MAX_CONTEXT = 1024
MAX_BATCH = 64
PREFILL = 4096
"""Tokens of prompts in one step, for both sides: every batch here is prefilled at once."""


class Side(Protocol):
    """What is compared."""

    version: str

    def generate(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        """Continue every prompt greedily by exactly ``tokens`` tokens."""


class EngineSide:
    """The engine of this project, all stages on one backend."""

    def __init__(self, folder: str, options: dict[str, Any]) -> None:
        import step3_hetero
        from step3_hetero.api import load
        from step3_hetero.runtime.request import SamplingParams

        stages = ["embed", "attention", "ffn", "head"]
        runtime = {"max_batch": MAX_BATCH, "prefill_chunk": PREFILL, "prefix_reuse": False}
        runtime["kv_blocks"] = MAX_BATCH * MAX_CONTEXT // 128
        roles = {"all": {"stages": stages, "backend": options.get("backend", "cpu")}}
        self.engine = load({"version": 1, "model": folder, "roles": roles, "runtime": runtime})
        self.params = SamplingParams
        self.version = f"step3-hetero {step3_hetero.__version__}"

    def generate(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        """See ``Side``."""
        params = self.params(max_tokens=tokens, ignore_eos=True)
        numbers = [self.engine.submit(prompt, params) for prompt in prompts]
        return [list(completion.token_ids) for completion in self.engine.run(numbers)]


class VllmSide:
    """vLLM, eager, without prefix caching."""

    def __init__(self, folder: str, options: dict[str, Any]) -> None:
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        os.environ |= {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": cores,
        }
        import vllm  # type: ignore[import-not-found]  # in an environment of its own

        self.llm = vllm.LLM(
            model=folder,
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype=options["dtype"],
            max_model_len=MAX_CONTEXT,
            max_num_seqs=MAX_BATCH,
            max_num_batched_tokens=PREFILL,
            max_logprobs=-1,
            enable_prefix_caching=False,
            seed=0,
        )
        self.params = vllm.SamplingParams
        self.version = f"vLLM {vllm.__version__}"

    def generate(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        """See ``Side``."""
        return [list(done.outputs[0].token_ids) for done in self._run(prompts, tokens)]

    def logprobs(self, prompts: list[list[int]], tokens: int, out: str) -> list[list[int]]:
        """Continue every prompt; save the log-probabilities after each token, file ``out``-N.npy.

        Shapes: a file is (prompt + tokens - 1, vocab): a row after each token but the last, which
        nothing follows.
        """
        finished = self._run(prompts, tokens, logprobs=-1, prompt_logprobs=-1)
        for number, done in enumerate(finished):
            rows = [*done.prompt_logprobs[1:], *done.outputs[0].logprobs]
            table = [[row[token].logprob for token in range(len(row))] for row in rows]
            np.save(f"{out}-{number}.npy", np.array(table, np.float64))
        return [list(done.outputs[0].token_ids) for done in finished]

    def _run(self, prompts: list[list[int]], tokens: int, **more: Any) -> list[Any]:
        params = self.params(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, **more
        )
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        done: list[Any] = self.llm.generate(asked, params, use_tqdm=False)
        return done


SIDES: dict[str, Callable[[str, dict[str, Any]], Side]] = {"engine": EngineSide, "vllm": VllmSide}


def answer(side: Any, command: dict[str, Any]) -> dict[str, Any]:
    """Carry one command out; say what came of it and how long it took."""
    action = getattr(side, command.pop("do"))
    start = time.perf_counter()
    result = action(**command)
    return {"result": result, "seconds": time.perf_counter() - start}


def main() -> None:
    """Load the model, then answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    name, folder, options = sys.argv[1:]
    wanted = json.loads(options)
    cores = sorted(os.sched_getaffinity(0))[: wanted.get("cores")]
    os.sched_setaffinity(0, cores)  # before torch is imported: it starts a thread for each
    side = SIDES[name](folder, wanted)
    print(json.dumps({"version": side.version, "pid": os.getpid()}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(side, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
