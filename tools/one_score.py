"""How often a row of attention over a narrow cache leaves decision 0009's bound, and not 0013's.

python tools/one_score.py                                       24 wide on cpu, 60 cases
python tools/one_score.py --wide --draws 15                     256 wide, 30 cases
python tools/one_score.py --backend cuda --option interpret=true --draws 10      minutes
"""

import click
import numpy as np

from step3_hetero.conformance.cases import trials
from step3_hetero.conformance.forms import FORMS, OpTrial
from step3_hetero.conformance.suite import Target
from step3_hetero.conformance.tolerance import judge
from step3_hetero.conformance.trial import host_results

SIZES = {
    False: "[heads=8,kv_heads=2,head_dim=24,queries=40+1+1+7,",
    True: "[heads=64,kv_heads=1,head_dim=256,queries=1+1+5,",
}
CACHES = ("kv=float8_e4m3fn,", "kv=int8,")


def chosen(wide: bool) -> list[OpTrial]:
    """Return the suite's float32 cases of one size over FP8 and INT8 caches."""
    found = [
        trial
        for name, trial in trials().items()
        if SIZES[wide] in name and name.endswith("float32]") and any(kv in name for kv in CACHES)
    ]
    return [trial for trial in found if isinstance(trial, OpTrial) and trial.op == "attention"]


@click.command()
@click.option("--backend", default="cpu", show_default=True, help="NAME or NAME:INDEX.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="Of the backend.")
@click.option("--wide", is_flag=True, help="Heads of 256 instead of 24.")
@click.option("--draws", type=click.IntRange(1), default=30, show_default=True, help="A cache.")
def main(backend: str, options: tuple[str, ...], wide: bool, draws: int) -> None:
    """Draw the inputs of a few cases again and count those with a row beyond either bound."""
    _, device = Target.parse(backend, options).open()
    plain, widened, worst, cases = 0, 0, 0.0, 0
    for trial in chosen(wide):
        for seed in range(draws):
            inputs = FORMS[trial.op].draw(trial.case, np.random.default_rng(seed))
            with np.errstate(all="ignore"):
                expected = trial.expect(inputs)
                placed = trial.place(device, inputs, trial.dtype)
                got = host_results(device, trial.call(device, placed, trial.dtype))["out"]
                own = judge(got, expected.want["out"], [r["out"] for r in expected.rounded])
                slack = expected.judged("out", got)
            cases += 1
            plain += bool((own.row_error > own.row_bound).any())
            widened += bool((slack.row_error > slack.row_bound).any())
            worst = max(worst, float(np.nanmax(slack.row_error / slack.row_bound)))
    width = 256 if wide else 24
    click.echo(
        f"{backend}, {width} wide: of {cases} cases {plain} beyond the bound of 0009, "
        f"{widened} beyond that of 0013; worst row {worst:.2f} of its bound"
    )


if __name__ == "__main__":
    main()
