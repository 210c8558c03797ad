"""``step3-hetero generate``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

import click

from step3_hetero.cli.loading import roles_options
from step3_hetero.cli.options import (
    Advance,
    config_argument,
    json_option,
    print_json,
    print_table,
    progress,
    set_option,
)
from step3_hetero.cli.seeing import Seeing, seeing_options, seen_engine, timings_json
from step3_hetero.errors import RequestError

if TYPE_CHECKING:
    from step3_hetero.runtime.request import Token

EPILOG = """\b
Examples:
  step3-hetero generate examples/digits.yaml --prompt "which digit is this ?" \\
      --image examples/digits/7_held-out_0007.png
  step3-hetero generate examples/digits.yaml --prompt "what is the sum ?" --logprobs 3 --json \\
      --image examples/digits/7_held-out_0007.png --image examples/digits/1_held-out_0047.png
  step3-hetero generate run.yaml --prompt-ids 1,2,3 --max-tokens 16 --temperature 0.8 --seed 7
  step3-hetero generate run.yaml --prompt-ids 1,2,3 --set roles.f.backend=cpu
  step3-hetero generate run.yaml --prompt-ids 1,2,3 --timings --trace trace.json
"""


@click.command("generate", epilog=EPILOG)
@config_argument
@click.option("--prompt", help="A question; the model's chat template is put around it.")
@click.option("--prompt-ids", metavar="1,2,3", help="Token ids instead of text.")
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(dir_okay=False),
    help="An image file. May be repeated.",
)
@click.option("--max-tokens", default=64, show_default=True, help="Tokens to generate at most.")
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", default=0, show_default=True, help="Keep the k most probable; 0: all.")
@click.option("--top-p", default=1.0, show_default=True, help="Keep the most probable p.")
@click.option("--seed", default=0, show_default=True, help="Seed of the draws.")
@click.option("--stop", multiple=True, help="End before this text. May be repeated.")
@click.option("--ignore-eos", is_flag=True, help="Go on at the model's own end.")
@click.option("--logprobs", type=int, metavar="K", help="Report log-probabilities, with K others.")
@roles_options
@seeing_options
@set_option
@json_option
def command(
    config: str,
    prompt: str | None,
    prompt_ids: str | None,
    images: tuple[str, ...],
    overrides: tuple[str, ...],
    as_json: bool,
    seeing: Seeing,
    roles: dict[str, Any],
    **sampling: Any,
) -> None:
    """Answer one prompt, with images if there are any."""
    from step3_hetero.api import shadow_check, shadow_report
    from step3_hetero.runtime.request import SamplingParams

    question = _question(prompt, prompt_ids)
    params = SamplingParams(**sampling)
    with seen_engine(config, overrides, seeing, **roles) as engine:
        with progress("generating, tokens", quiet=not as_json and sys.stdout.isatty()) as advance:
            counter = _Counter(None if as_json else _show, advance, params.max_tokens)
            done = engine.generate(
                question, params, images=[Path(i) for i in images], on_token=counter
            )
        if as_json:
            placement = engine.placement.to_json()
            timings = {**done.timings, **timings_json(engine)}
            seen = {"timings": timings, "placement": placement, "shadow": shadow_report(engine)}
            print_json({**done.to_json(), **seen})
            return
        if done.text is None:
            click.echo(",".join(map(str, done.token_ids)), nl=False)
        click.echo()
        if done.logprobs is not None:
            _print_logprobs(engine, done)
        if shadow := shadow_check(engine):
            click.echo(shadow.sentence(), err=True)


class _Counter:
    """Counts tokens for the bar and passes them on."""

    def __init__(self, shown: Callable[[Token], None] | None, advance: Advance, most: int) -> None:
        self.shown, self.advance, self.most, self.count = shown, advance, most, 0

    def __call__(self, token: Token) -> None:
        self.count += 1
        self.advance(self.count, self.most)
        if self.shown is not None:
            self.shown(token)


def _show(token: Token) -> None:
    """Print text as it comes."""
    click.echo(token.text, nl=False)


def _question(prompt: str | None, prompt_ids: str | None) -> str | list[int]:
    if (prompt is None) == (prompt_ids is None):
        raise RequestError("give either --prompt or --prompt-ids, and not both")
    if prompt is not None:
        return prompt
    try:
        return [int(part) for part in str(prompt_ids).split(",")]
    except ValueError:
        raise RequestError(
            f"--prompt-ids: {short(prompt_ids)} refused; allowed: whole numbers with commas, as "
            "1,2,3"
        ) from None


def _print_logprobs(engine: Any, done: Any) -> None:
    def word(number: int) -> str:
        text = engine.tokenizer.decode([number]) if engine.tokenizer else ""
        return f"{number} {text!r}" if text else str(number)

    rows = [
        (word(t), f"{p.chosen:z.4f}", ", ".join(f"{word(i)} {v:z.4f}" for i, v in p.top))
        for t, p in zip(done.token_ids, done.logprobs, strict=True)
    ]
    print_table("log-probabilities", ("token", "logprob", "most probable"), rows)
