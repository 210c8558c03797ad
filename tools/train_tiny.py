"""Train the tiny Step-3 on handwritten digits and write its folder. See ``--help``."""

import time
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from tiny.digits import Digits, split
from tiny.folder import refusal, replaced, write_examples, write_model
from tiny.judge import Accuracy, ablate, measure, rounded
from tiny.net import Step3
from tiny.recipe import Recipe, train

ROOT = Path(__file__).resolve().parent.parent
MODEL, EXAMPLES = ROOT / "models" / "tiny-step3-digits", ROOT / "examples" / "digits"
FOLDER = click.Path(path_type=Path, file_okay=False)
LOG_EVERY = 300
HELP = """Train a small Step-3 on scikit-learn's handwritten digits and write a checkpoint folder.

Needs the `cpu` extra and scikit-learn. About a quarter of an hour on two free cores.

\b
Examples:
  python tools/train_tiny.py                        the published model, whole
  python tools/train_tiny.py --out /tmp/tiny        the same, elsewhere
  python tools/train_tiny.py --dev --steps 1000     try a setting; writes nothing
"""


@click.command(help=HELP, context_settings={"max_content_width": 100})
@click.option("--out", type=FOLDER, default=MODEL, help="Folder to write; replaced as a whole.")
@click.option("--examples", type=FOLDER, default=EXAMPLES, help="Folder for the example pictures.")
@click.option("--steps", type=click.IntRange(1), default=Recipe.steps, show_default=True)
@click.option("--seed", type=int, default=Recipe.seed, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=Recipe.threads, show_default=True)
@click.option("--dev", is_flag=True, help="Hold out a slice of the training side; write nothing.")
def main(out: Path, examples: Path, steps: int, seed: int, threads: int, dev: bool) -> None:
    """Train, measure, write."""
    for reason in filter(None, map(refusal, (out, examples))):
        raise click.UsageError(reason)
    recipe, console = Recipe(steps=steps, seed=seed, threads=threads), Console()
    learn, held_out = split(dev=dev)
    console.print(f"{len(learn)} digits to train on, {len(held_out)} held out")
    began = time.perf_counter()
    net = rounded(_train_with_bar(recipe, learn, console))
    minutes = (time.perf_counter() - began) / 60
    whole = measure(net, held_out)
    console.print(f"{minutes:.1f} minutes; {whole}")
    if dev:
        return
    facts = _facts(recipe, net, whole, ablate(net, held_out), learn, held_out)
    with replaced(out) as folder:
        write_model(folder, net, held_out, facts | {"minutes": f"{minutes:.0f}"})
    with replaced(examples) as folder:
        write_examples(folder, held_out)
    console.print(f"wrote {out} and {examples}")


def _train_with_bar(recipe: Recipe, digits: Digits, console: Console) -> Step3:
    """Train under a progress bar; every few hundred steps a line stays, for logs."""
    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("training", total=recipe.steps)

        def report(step: int, loss: float) -> None:
            progress.update(task, completed=step, description=f"loss {loss:.3f}")
            if step % LOG_EVERY == 0:
                progress.console.print(f"step {step}: loss {loss:.4f}")

        return train(recipe, digits, report)


def _facts(
    recipe: Recipe,
    net: Step3,
    whole: Accuracy,
    ablations: dict[str, Accuracy],
    learn: Digits,
    held_out: Digits,
) -> dict[str, str]:
    """Return what the model's README states, by the names in its page."""
    return {
        "parameters": f"{sum(p.numel() for p in net.parameters()):,}",
        "train": str(len(learn)),
        "held_out": str(len(held_out)),
        "single": f"{whole.single:.1%}",
        "sums": f"{whole.sums:.1%}",
        "ablations": "\n".join(
            f"| {name} | {a.single:.1%} | {a.sums:.1%} |" for name, a in ablations.items()
        ),
        "steps": str(recipe.steps),
        "batch": str(recipe.batch),
        "rate": str(recipe.learning_rate),
        "seed": str(recipe.seed),
        "plain": f"{recipe.plain_share:.0%}",
        "threads": f"{recipe.threads} of torch {torch.__version__}",
    }


if __name__ == "__main__":
    main()
