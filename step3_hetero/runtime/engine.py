"""The engine: requests in, tokens out. It owns all that must survive a lost device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from step3_hetero.errors import RequestError
from step3_hetero.model.config import ModelConfig
from step3_hetero.model.prompt import Prompt
from step3_hetero.model.tokenizer import Detokeniser, Tokenizer
from step3_hetero.runtime.executor import Executor
from step3_hetero.runtime.microbatch import BatchResult, MicroBatch
from step3_hetero.runtime.placing import Placement
from step3_hetero.runtime.prompting import Prompter
from step3_hetero.runtime.request import (
    Completion,
    ImageLike,
    OnToken,
    PromptLike,
    Request,
    SamplingParams,
)
from step3_hetero.runtime.scheduler import Scheduler, Share, assemble
from step3_hetero.runtime.sequence import SequenceState

Progress = Callable[[int, int], None]
"""Called after every step with (tokens done, tokens at most)."""


class Engine:
    """Serves requests over an executor, one ``step`` at a time."""

    def __init__(
        self,
        model: ModelConfig,
        executor: Executor,
        prompter: Prompter,
        placement: Placement,
        *,
        max_batch: int,
        prefill_chunk: int,
    ) -> None:
        self.model = model
        self.executor = executor
        self.prompter = prompter
        self.placement = placement
        self.scheduler = Scheduler(max_batch, prefill_chunk, executor.kv_blocks)
        self._sequences: dict[int, SequenceState] = {}
        self._submitted = 0

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Return the checkpoint's tokenizer, if it has one."""
        return self.prompter.tokenizer

    def generate(
        self,
        prompt: PromptLike,
        params: SamplingParams | None = None,
        *,
        images: Sequence[ImageLike] = (),
        on_token: OnToken | None = None,
    ) -> Completion:
        """Answer one prompt: a question (the chat template is put around it) or token ids.

        Raises:
            RequestError: the prompt, an image or a parameter cannot be served.
        """
        number = self.submit(prompt, params, images=images, on_token=on_token)
        return self.run([number])[0]

    def generate_all(
        self,
        requests: Sequence[Request],
        *,
        on_progress: Progress | None = None,
    ) -> list[Completion]:
        """Answer many requests, batched; the answers come in the order of the requests."""
        numbers = [self.submit(r.prompt, r.params, images=r.images) for r in requests]
        return self.run(numbers, on_progress)

    def submit(
        self,
        prompt: PromptLike,
        params: SamplingParams | None = None,
        *,
        images: Sequence[ImageLike] = (),
        on_token: OnToken | None = None,
    ) -> int:
        """Queue a request and return its number."""
        params = params or SamplingParams()
        return self._queue(self.prompter.build(prompt, images), params, on_token)

    def step(self) -> list[Completion]:
        """Run one micro-batch; return the requests that it finished."""
        shares = self.scheduler.next_shares()
        if not shares:
            return []
        now = time.perf_counter()
        for share in shares:
            share.sequence.started = share.sequence.started or now
        batch = assemble(shares, self.prompter.banned_id)
        self.executor.submit(batch)
        self._distribute(shares, batch, self.executor.collect())
        return [self._finish(s.sequence) for s in shares if s.sequence.finished]

    def run(self, numbers: Sequence[int], on_progress: Progress | None = None) -> list[Completion]:
        """Step until the given requests are finished; return them in the order given."""
        pending, done = set(numbers), {}
        total = sum(self._sequences[n].max_new for n in numbers)
        while pending:
            for completion in self.step():
                done[completion.request_id] = completion
                pending.discard(completion.request_id)
            if on_progress is not None:
                running = sum(len(self._sequences[n].generated) for n in pending)
                whole = sum(total_tokens(done[n]) for n in numbers if n in done)
                on_progress(running + whole, total)
        return [done[n] for n in numbers]

    def cancel(self, number: int) -> Completion:
        """Stop a request and free what it holds; return what it had so far.

        Raises:
            RequestError: no such request is running.
        """
        if number not in self._sequences:
            raise RequestError(f"no request {number}; running: {sorted(self._sequences)}")
        return self._finish(self._sequences[number])

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the logits after each token of a text.

        Shapes: token_ids (tokens,) -> (tokens, vocab) float32 (float64 where runtime.dtype is
        fp64).
        """
        prompt = self.prompter.build(list(token_ids), ())
        number = self._queue(prompt, SamplingParams(max_tokens=1), None, all_rows=True)
        sequence = self._sequences[number]
        while sequence.finished is None:
            self.step()
        return np.concatenate(sequence.logits)

    def close(self) -> None:
        """Release the executor."""
        self.executor.close()

    def __enter__(self) -> Engine:
        """Return the engine itself."""
        return self

    def __exit__(self, *exc: Any) -> None:
        """Close the engine."""
        self.close()

    def _queue(
        self,
        prompt: Prompt,
        params: SamplingParams,
        on_token: OnToken | None,
        *,
        all_rows: bool = False,
    ) -> int:
        max_new = self._check_length(len(prompt.token_ids), params.max_tokens, all_rows)
        self._submitted += 1
        sequence = SequenceState(
            id=self._submitted,
            prompt=prompt,
            params=params,
            stop_ids=frozenset() if params.ignore_eos else self.prompter.stop_ids,
            max_new=max_new,
            detokeniser=Detokeniser(self.tokenizer) if self.tokenizer else None,
            on_token=on_token,
            all_rows=all_rows,
        )
        self._sequences[sequence.id] = sequence
        self.scheduler.waiting.append(sequence)
        return sequence.id

    def _check_length(self, prompt: int, wanted: int, all_rows: bool) -> int:
        """Return how many tokens may be generated."""
        context = self.model.text.max_positions
        room = context - prompt
        if prompt == 0:
            raise RequestError("the prompt is empty; give at least one token")
        if room < (0 if all_rows else 1):
            raise RequestError(
                f"the prompt has {prompt} tokens, the model's context is {context} and at least "
                "one token has to be generated; shorten the prompt"
            )
        max_new = 0 if all_rows else min(wanted, room)
        if not self.scheduler.fits(prompt + max_new):
            held = self.scheduler.allocator.blocks
            raise RequestError(
                f"prompt and answer take {prompt + max_new} tokens, the KV cache holds "
                f"{held * 128}; raise runtime.kv_blocks ({held}) or lower max_tokens"
            )
        return max_new

    def _distribute(self, shares: Sequence[Share], batch: MicroBatch, result: BatchResult) -> None:
        """Give each sequence its chosen token, or its logits."""
        row = 0
        for share in shares:
            sequence, completes = share.sequence, share.completes
            sequence.computed += share.count
            if sequence.all_rows:
                assert result.logits is not None
                sequence.logits.append(result.logits[row : row + share.count])
                row += share.count
                sequence.finished = "length" if completes else None
            elif completes:
                sequence.accept(int(result.ids[row]), result.logprobs[row])
                row += 1

    def _finish(self, sequence: SequenceState) -> Completion:
        self.scheduler.release(sequence)
        for image in range(len(sequence.prompt.images)):
            self.executor.forget_image(sequence.image_key(image))
        del self._sequences[sequence.id]
        return sequence.completion()


def total_tokens(completion: Completion) -> int:
    """Return the tokens a finished request generated."""
    return len(completion.token_ids)
