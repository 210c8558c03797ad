"""The engine: requests in, tokens out. It owns all that must survive a lost device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from step3_hetero.errors import RequestError, TransportTimeout
from step3_hetero.model.config import ModelConfig
from step3_hetero.model.prompt import Prompt
from step3_hetero.model.tokenizer import Detokeniser, Tokenizer
from step3_hetero.runtime.deadlines import Deadlines
from step3_hetero.runtime.executor import Executor
from step3_hetero.runtime.instance import Flight
from step3_hetero.runtime.lanes import Lanes
from step3_hetero.runtime.microbatch import BatchResult
from step3_hetero.runtime.placing import Placement
from step3_hetero.runtime.prompting import Prompter
from step3_hetero.runtime.request import (
    Completion,
    ImageLike,
    OnToken,
    PromptLike,
    Request,
    SamplingParams,
    Token,
)
from step3_hetero.runtime.sequence import SequenceState
from step3_hetero.runtime.stats import EngineStats
from step3_hetero.specs import LOGICAL_BLOCK

Progress = Callable[[int, int], None]
"""Called after every step with (tokens done, tokens at most)."""

PATIENCE_S = 60.0
"""A deadline beyond this does not bound the wait for a micro-batch: executors have a bound of their
own, which is not to be stretched."""


class Engine:
    """Serves requests over an executor, one ``step`` at a time."""

    def __init__(
        self,
        model: ModelConfig,
        executor: Executor,
        prompter: Prompter,
        placement: Placement | None = None,
        *,
        max_batch: int,
        prefill_chunk: int,
        prefix_reuse: bool = False,
        max_waiting: int | None = None,
    ) -> None:
        self.model = model
        self.executor = executor
        self.prompter = prompter
        self._placement = placement
        self.lanes = Lanes(executor, max_batch, prefill_chunk, prefix_reuse)
        self._max_waiting = max_waiting
        self._deadlines = Deadlines()
        self._sequences: dict[int, SequenceState] = {}
        self._done: dict[int, Completion] = {}
        self._submitted = 0

    @property
    def placement(self) -> Placement:
        """Return where each stage runs, as ``load`` resolved it."""
        assert self._placement is not None, "this engine was put together without a config"
        return self._placement

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
        """Answer many requests, batched; the answers come in the order of the requests.

        All are queued at once, however many wait: they are in memory already.
        """
        built = [(self.prompter.build(r.prompt, r.images), r.params) for r in requests]
        for prompt, params in built:
            self._room(prompt, params)
        return self.run([self._queue(p, params, None) for p, params in built], on_progress)

    def submit(
        self,
        prompt: PromptLike,
        params: SamplingParams | None = None,
        *,
        images: Sequence[ImageLike] = (),
        on_token: OnToken | None = None,
    ) -> int:
        """Queue a request and return its number.

        Raises:
            RequestError: the queue is full, or the prompt, an image or a parameter cannot be
                served. Nothing is held then.
        """
        waiting = len(self.lanes.waiting)
        if self._max_waiting is not None and waiting >= self._max_waiting:
            raise RequestError(
                f"the queue is full: {waiting} requests wait, runtime.max_waiting allows "
                f"{self._max_waiting}; ask again once some are done, or raise it"
            )
        params = params or SamplingParams()
        return self._queue(self.prompter.build(prompt, images), params, on_token)

    def step(self) -> list[Completion]:
        """Run one micro-batch; return the requests finished since the last call.

        An exception of a streaming callback cancels its own request and is raised once the step's
        other requests are in order.
        """
        self._advance()
        finished, self._done = list(self._done.values()), {}
        return finished

    def run(self, numbers: Sequence[int], on_progress: Progress | None = None) -> list[Completion]:
        """Step until the given requests are finished; return them in the order given.

        Others that finish meanwhile wait for the next ``step`` or ``run``. On an exception the
        given requests are cancelled.

        Raises:
            RequestError: a number is not that of a request, or its answer was given out before.
        """
        for number in numbers:
            if number not in self._sequences and number not in self._done:
                raise RequestError(f"no request {number}; running: {sorted(self._sequences)}")
        total = sum(self._sequences[n].max_new for n in numbers if n in self._sequences)
        try:
            while any(n in self._sequences for n in numbers):
                self._advance()
                if on_progress is not None:
                    on_progress(sum(map(self._generated, numbers)), total)
        except BaseException:
            for number in numbers:
                if number in self._sequences:
                    self.cancel(number)
                self._done.pop(number, None)
            raise
        return [self._done.pop(number) for number in numbers]

    def cancel(self, number: int) -> Completion:
        """Stop a request and free what it holds; return what it had so far.

        Safe in a streaming callback. ``step`` and ``run`` report the request as cancelled, too.

        Raises:
            RequestError: no such request is running.
        """
        if number not in self._sequences:
            raise RequestError(f"no request {number}; running: {sorted(self._sequences)}")
        sequence = self._sequences[number]
        sequence.finish("cancelled")
        return self._finish(sequence)

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the logits after each token of a text.

        Shapes: token_ids (tokens,) -> (tokens, vocab) float32 (float64 where runtime.dtype is
        fp64).
        """
        prompt = self.prompter.build(list(token_ids), ())
        number = self._queue(prompt, SamplingParams(max_tokens=1), None, all_rows=True)
        sequence = self._sequences[number]
        self.run([number])
        assert sequence.logits is not None
        return sequence.logits

    def stats(self) -> EngineStats:
        """Return what runs, waits and is held now, and what had to be done again."""
        return self.lanes.stats()

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
        max_new = 0 if all_rows else self._room(prompt, params)
        if all_rows:
            self._check_length(len(prompt.token_ids), 0)
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
        self.lanes.add(sequence)
        if params.deadline_s is not None:
            self._deadlines.add(sequence.id, sequence.arrived + params.deadline_s)
        return sequence.id

    def _room(self, prompt: Prompt, params: SamplingParams) -> int:
        """Return how many tokens may be generated after a prompt."""
        if params.stop and self.tokenizer is None:
            raise RequestError(
                f"stop {params.stop} needs text, but the checkpoint has no tokenizer.json"
            )
        length = len(prompt.token_ids)
        self._check_length(length, 1)
        max_new = min(params.max_tokens, self.model.text.max_positions - length)
        self._check_blocks(length + max_new)
        return max_new

    def _check_length(self, prompt: int, wanted: int) -> None:
        context = self.model.text.max_positions
        if prompt == 0:
            raise RequestError("the prompt is empty; give at least one token")
        if prompt + wanted > context:
            room = " and at least one token has to be generated" if wanted else ""
            raise RequestError(
                f"the prompt has {prompt} tokens, the model's context is {context}{room}; "
                "shorten the prompt"
            )
        self._check_blocks(prompt + wanted)

    def _check_blocks(self, tokens: int) -> None:
        if not self.lanes.fits(tokens):
            held = self.executor.kv_blocks
            raise RequestError(
                f"prompt and answer take {tokens} tokens, the KV cache holds "
                f"{held * LOGICAL_BLOCK}; raise runtime.kv_blocks ({held}) or lower max_tokens"
            )

    def _advance(self) -> None:
        """Keep every lane busy, wait for one micro-batch and file what it finished."""
        self._end_late_ones()
        now = time.perf_counter()
        for flight in self.lanes.start(self.prompter.banned_id):
            for share in flight.shares:
                share.sequence.started = share.sequence.started or now
        landed = self._land()
        if landed is None:
            return
        flight, result = landed
        told = [] if result is None else self._distribute(flight, result)
        self.lanes.settle(flight)
        for share in flight.shares:
            if share.sequence.finished and share.sequence.id in self._sequences:
                self._finish(share.sequence)
        self._tell(told)

    def _land(self) -> tuple[Flight, BatchResult | None] | None:
        """Wait for a micro-batch, or until the next request's deadline if that is sooner."""
        until = self._deadlines.next()
        left = None if until is None else max(0.0, until - time.perf_counter())
        if left is None or left > PATIENCE_S:
            return self.lanes.land()
        try:
            return self.lanes.land(left)
        except TransportTimeout:
            if not self._end_late_ones():
                raise
            return None

    def _end_late_ones(self) -> bool:
        """End the requests whose deadlines have passed; say whether there were any."""
        late = self._deadlines.passed(time.perf_counter()) if len(self._deadlines) else []
        for number in late:
            sequence = self._sequences[number]
            sequence.finish("deadline")
            self._finish(sequence)
        return bool(late)

    def _distribute(self, flight: Flight, result: BatchResult) -> list[tuple[SequenceState, Token]]:
        """Give each sequence its chosen token, or its logits; return what is to be told."""
        told, row = [], 0
        for share in flight.shares:
            sequence, completes = share.sequence, share.completes
            start, sequence.computed = sequence.computed, sequence.computed + share.count
            rows, row = row, row + share.rows(completes)
            if sequence.finished:  # cancelled, or late, while this was under way
                continue
            if sequence.all_rows:
                assert result.logits is not None
                self._keep_logits(sequence, start, result.logits[rows:row])
                sequence.finished = "length" if completes else None
            elif completes:
                token = sequence.accept(int(result.ids[rows]), result.logprobs[rows])
                told.append((sequence, token))
        return told

    @staticmethod
    def _keep_logits(sequence: SequenceState, start: int, rows: npt.NDArray[Any]) -> None:
        if sequence.logits is None:
            sequence.logits = np.empty((sequence.prompt_tokens, rows.shape[1]), rows.dtype)
        sequence.logits[start : start + len(rows)] = rows

    def _tell(self, told: Sequence[tuple[SequenceState, Token]]) -> None:
        """Call the streaming callbacks; one that raises loses its own request only."""
        failed: BaseException | None = None
        for sequence, token in told:
            if sequence.on_token is None:
                continue
            try:
                sequence.on_token(token)
            except BaseException as raised:
                failed = raised
                if sequence.id in self._sequences:
                    self.cancel(sequence.id)
        if failed is not None:
            raise failed

    def _finish(self, sequence: SequenceState) -> Completion:
        self.lanes.release(sequence)
        self._deadlines.drop(sequence.id)
        self._sequences.pop(sequence.id, None)
        completion = self._done[sequence.id] = sequence.completion()
        return completion

    def _generated(self, number: int) -> int:
        """Return the tokens a request has so far."""
        if number in self._done:
            return len(self._done[number].token_ids)
        return len(self._sequences[number].generated)
