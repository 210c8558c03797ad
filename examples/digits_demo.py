"""A small Step-3 reads handwritten digits: attention on one backend, FFN on another.

python examples/digits_demo.py
python examples/digits_demo.py --set roles.f.backend=cpu
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
from PIL import Image
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from step3_hetero import load
from step3_hetero.config import Config
from step3_hetero.errors import Step3HeteroError
from step3_hetero.evals.digits import answer_of

HERE = Path(__file__).parent
SINGLE, SUM = "which digit is this ?", "what is the sum ?"
QUESTIONS = [
    (SINGLE, ["7_held-out_0007.png"]),
    (SINGLE, ["3_held-out_0003.png"]),
    (SUM, ["9_held-out_0037.png", "4_held-out_0064.png"]),
    (SUM, ["2_held-out_0002.png", "6_held-out_0095.png"]),
]
SHADES = " .:-=+*#%@"


def picture(path: Path) -> Text:
    """Draw an image with characters, two columns for each pixel of a 16 x 16 thumbnail."""
    small = Image.open(path).convert("L").resize((16, 16), Image.Resampling.BILINEAR)
    grey = [small.getpixel((x, y)) for y in range(16) for x in range(16)]
    shade = [SHADES[value * (len(SHADES) - 1) // 255] * 2 for value in grey]
    return Text("\n".join("".join(shade[row * 16 : row * 16 + 16]) for row in range(16)))


def label(names: list[str]) -> str:
    """Return the right answer: the digit before each file name's first underscore, added up."""
    return str(sum(int(name.partition("_")[0]) for name in names))


@click.command()
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="As in generate.")
def main(overrides: tuple[str, ...]) -> None:
    """Ask a small Step-3 about pictures; print its answers and where each stage ran."""
    console = Console()
    engine = load(Config.read(HERE / "digits.yaml", overrides))
    for question, names in QUESTIONS:
        images = [HERE / "digits" / name for name in names]
        answer = engine.generate(question, images=images)
        right = answer_of(answer) == label(names)
        console.print(Columns([Panel(picture(i), title=i.name, width=36) for i in images]))
        console.print(f"[bold]{question}[/]  {len(images)} image(s), held out from training")
        verdict = "[green]right[/]" if right else f"[red]wrong: it is {label(names)}[/]"
        console.print(f"  answer: [bold]{answer.text}[/]  {verdict}\n", highlight=False)
    console.print("[bold]placement[/] (examples/digits.yaml; change a backend there and run again)")
    for role in engine.placement.to_json()["roles"]:
        where = f"  role {role['role']}: {role['stages']} on {role['device']}"
        console.print(where, highlight=False)


if __name__ == "__main__":
    try:
        main(standalone_mode=True)
    except Step3HeteroError as error:
        sys.exit(f"error: {error}")
