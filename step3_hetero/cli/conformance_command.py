"""``step3-hetero conformance run|compare|record|verify``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from step3_hetero.cli.options import Number, json_option, print_json, print_table, progress

if TYPE_CHECKING:
    from step3_hetero.conformance.certificate import Certificate
    from step3_hetero.conformance.exam import CaseResult

EXAMPLES = {
    "run": """\
  step3-hetero conformance run --backend cpu
  step3-hetero conformance run --backend cuda:1 --full --json cuda.json --junit cuda.xml
  step3-hetero conformance run --backend cpu --only "attention bfloat16" --only rope
""",
    "compare": "  step3-hetero conformance compare cuda.json ascend.json\n",
    "record": "  step3-hetero conformance record --backend cpu --out vectors.safetensors\n",
    "verify": "  step3-hetero conformance verify vectors.safetensors --backend ascend\n",
}


def _epilog(*commands: str) -> str:
    """Return the examples of some commands as ``--help`` shows them."""
    return "\b\nExamples:\n" + "".join(EXAMPLES[name] for name in commands)


INTERRUPTED = 130
"""The exit code of a run that Ctrl-C ended: 128 and the signal's number, as shells have it."""

file_argument = click.Path(dir_okay=False, path_type=Path)
backend_option = click.option(
    "--backend", "target", required=True, metavar="NAME[:INDEX]", help="The device on trial."
)
only_option = click.option(
    "--only",
    multiple=True,
    metavar="TERM",
    help="Words that a case's id must contain, or !WORD that it must not. May be repeated.",
)
option_option = click.option(
    "--option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of the backend, as in a role's `options`. May be repeated.",
)
workers_option = click.option(
    "--workers",
    "count",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Processes; each opens the device.",
)
deadline_option = click.option(
    "--deadline",
    type=Number(1),
    default=300.0,
    show_default=True,
    help="Seconds after which a case hangs.",
)
scope_option = click.option(
    "--full/--quick", "full", default=False, help="All cases, real sizes too; quick by default."
)


@click.group("conformance", epilog=_epilog(*EXAMPLES))
def command() -> None:
    """Hold a backend against the reference, case by case, and certify what holds."""


@command.command("run", epilog=_epilog("run"))
@backend_option
@option_option
@click.option("--interpret", is_flag=True, help="Short for --option interpret=true.")
@only_option
@scope_option
@click.option("--json", "certificate", type=file_argument, help="Write the certificate here.")
@click.option("--junit", type=file_argument, help="Write a JUnit report here.")
@workers_option
@deadline_option
def run(
    target: str,
    options: tuple[str, ...],
    interpret: bool,
    only: tuple[str, ...],
    full: bool,
    certificate: Path | None,
    junit: Path | None,
    count: int,
    deadline: float,
) -> None:
    """Run the suite on one device. Exits 1 when a case fails that is no known gap.

    Ctrl-C ends the run early; what was found until then is written, as a selection of cases.
    """
    from step3_hetero.conformance.certificate import certify
    from step3_hetero.conformance.gaps import known_gaps
    from step3_hetero.conformance.junit import write_junit
    from step3_hetero.conformance.suite import Target, apply_gaps, select, workers
    from step3_hetero.placement.written import check_writable

    asked = Target.parse(target, [*options, *(["interpret=true"] if interpret else [])])
    backend = asked.backend()
    gaps = known_gaps(backend)
    chosen = select(only, full=full)
    check_writable("--json", certificate)
    check_writable("--junit", junit)
    results: list[CaseResult] = []
    is_whole = True
    with workers(asked, count=count, deadline_s=deadline) as pool:
        info = pool.describe()
        with progress(f"conformance of {asked}") as advance:
            try:
                for result in pool.examine(chosen):
                    results.append(result)
                    advance(len(results), len(chosen))
            except KeyboardInterrupt:
                is_whole = False
                results += pool.found(results)
                pool.stop()
    if not is_whole:
        click.echo(f"interrupted after {len(results)} of {len(chosen)} cases", err=True)
    results = apply_gaps(results, gaps)
    scope: Literal["quick", "full", "selected"] = "full" if full else "quick"
    found = certify(backend, info, results, scope if is_whole and not only else "selected")
    _print_run(found, results)
    if certificate is not None:
        found.write(certificate)
    if junit is not None:
        write_junit(junit, f"conformance of {asked}", results)
    if not (found.passed and is_whole):
        raise click.exceptions.Exit(1 if is_whole else INTERRUPTED)


@command.command("compare", epilog=_epilog("compare"))
@click.argument("one", type=file_argument)
@click.argument("other", type=file_argument)
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True,
              help="Differences to list at most; --json has all.")  # fmt: skip
@json_option
def compare_command(one: Path, other: Path, limit: int, as_json: bool) -> None:
    """List where two devices differ, although both may pass; the largest differences first."""
    from step3_hetero.conformance.certificate import Certificate
    from step3_hetero.conformance.compare import compare

    certificates = [Certificate.read(path) for path in (one, other)]
    found = compare(*certificates)
    if as_json:
        print_json({
            "shared": found.shared,
            "only": {str(p): sorted(o) for p, o in zip((one, other), found.only, strict=True)},
            "status": [d.to_json() for d in found.status],
            "results": [d.to_json() for d in found.results],
            "other_cases": found.other_cases,
        })  # fmt: skip
        return
    names = [f"{c.backend} ({c.device.description})" for c in certificates]
    if found.other_cases:
        click.echo("note: the two were judged by different versions of the cases")
    if found.status:
        standings = [(d.id, *d.status) for d in found.status]
        print_table("another standing", ("case", *names), standings)
    rows = [
        (d.id, d.output, f"{d.apart:.2g}", f"{d.allowed:.2g}", f"{d.share:.2f}")
        for d in found.results[:limit]
    ]
    title = f"both pass, results differ: {len(found.results)} of {found.shared} cases"
    header = ("case", "output", "apart (squared, about)", "allowed to either", "share")
    print_table(title, header, rows)


@command.command("record", epilog=_epilog("record"))
@backend_option
@option_option
@only_option
@scope_option
@click.option("--out", required=True, type=file_argument, help="The file to write.")
def record_command(
    target: str, options: tuple[str, ...], only: tuple[str, ...], full: bool, out: Path
) -> None:
    """Record inputs, exact results and bounds for a machine that this one cannot meet.

    Cases that fail here or are not claimed are left out and told; the whole model is one of them.
    """
    from step3_hetero.conformance import vectors
    from step3_hetero.conformance.forms import OpTrial
    from step3_hetero.conformance.stages import StageCase
    from step3_hetero.conformance.suite import Target, select
    from step3_hetero.placement.written import check_writable

    asked = Target.parse(target, options)
    asked.backend()
    every = select(only, full=full)
    chosen = [t for t in every if isinstance(t, OpTrial | StageCase)]
    check_writable("--out", out)
    backend, device = asked.open()
    kept = {}
    left_out = {t.id: "a whole model is not recorded" for t in every if t not in chosen}
    with progress(f"recording {asked}") as advance:
        for done, (case, parts) in enumerate(vectors.record(backend, device, chosen), 1):
            if isinstance(parts, str):
                left_out[case] = parts
            else:
                kept[case] = parts
            advance(done, len(chosen))
    for case, why in left_out.items():
        click.echo(f"left out: {case}: {why}", err=True)
    if not kept:
        click.echo(f"{out}: no case to record; nothing is written", err=True)
        raise click.exceptions.Exit(1)
    vectors.write(out, backend, device, kept)
    click.echo(f"{out}: {len(kept)} of {len(every)} cases, {out.stat().st_size:,} bytes")


@command.command("verify", epilog=_epilog("verify"))
@click.argument("file", type=file_argument)
@backend_option
@option_option
@click.option("--junit", type=file_argument, help="Write a JUnit report here.")
@workers_option
@deadline_option
@json_option
def verify_command(
    file: Path,
    target: str,
    options: tuple[str, ...],
    junit: Path | None,
    count: int,
    deadline: float,
    as_json: bool,
) -> None:
    """Run the cases of a vector file here and hold them against what was recorded there."""
    from step3_hetero.conformance import vectors
    from step3_hetero.conformance.cases import trials
    from step3_hetero.conformance.gaps import known_gaps
    from step3_hetero.conformance.junit import write_junit
    from step3_hetero.conformance.suite import Target, apply_gaps, workers
    from step3_hetero.placement.written import check_writable

    asked = Target.parse(target, options)
    gaps = known_gaps(asked.backend())
    manifest, cases = vectors.read(file)
    check_writable("--junit", junit)
    chosen = [trials()[case] for case in cases]
    results = []
    with (
        workers(asked, count=count, deadline_s=deadline) as pool,
        progress(f"verifying on {asked}") as advance,
    ):
        for result in pool.verify(file, chosen):
            results.append(result)
            advance(len(results), len(cases))
    results = apply_gaps(results, gaps)
    if junit is not None:
        write_junit(junit, f"vectors on {asked}", results)
    failed = [r for r in results if r.status in ("failed", "crashed", "timeout")]
    if as_json:
        said = [{**_brief(r), "apart": vectors.apart(r, cases[r.id])} for r in results]
        print_json({"recorded_on": manifest["backend"], "verified_on": str(asked), "cases": said})
    else:
        counts = Counter(r.status for r in results)
        total = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
        where = f"{manifest['backend']} ({manifest['device']})"
        click.echo(f"recorded on {where}, verified on {asked}: {total}")
        _print_failures(failed)
    if failed:
        raise click.exceptions.Exit(1)


def _brief(result: CaseResult) -> dict[str, object]:
    said = [f"{f.check}: {f.message}" for f in result.findings]
    return {"id": result.id, "status": result.status, "worst": result.worst, "findings": said}


def _print_run(certificate: Certificate, results: list[CaseResult]) -> None:
    groups: dict[tuple[str, str], list[CaseResult]] = {}
    for result in results:
        groups.setdefault((result.op, result.dtype), []).append(result)
    rows = []
    for (op, dtype), group in groups.items():
        tried = [r for r in group if r.status != "unclaimed"]
        counts = {
            s: sum(r.status == s for r in group) for s in ("passed", "known gap", "unclaimed")
        }
        worst = max((r.worst for r in tried), default=None)
        failed = len(group) - sum(counts.values())
        shown = "" if worst is None else ("exact" if worst == 0 else f"{worst:.2f}")
        rows.append((op, dtype, counts["passed"], failed or "", counts["known gap"] or "",
                     counts["unclaimed"] or "", shown))  # fmt: skip
    header = ("op", "dtype", "passed", "failed", "known gaps", "not claimed", "worst of bound")
    print_table(f"conformance of {certificate.device.name} ({certificate.library})", header, rows)
    _print_failures([r for r in results if r.status in ("failed", "crashed", "timeout")])
    if not certificate.text_layer:
        click.echo(f"no backend of Step-3: claims no {', '.join(certificate.missing)}")
    if certificate.claimed_untested and certificate.scope != "selected":
        click.echo(f"claimed, and tried by no case: {', '.join(certificate.claimed_untested)}")
    total = ", ".join(f"{n} {status}" for status, n in sorted(certificate.counts.items()))
    verdict = "passed" if certificate.passed else "FAILED"
    click.echo(f"{verdict}: {total} ({certificate.scope} run, tier: {certificate.device.tier})")


def _print_failures(failed: list[CaseResult]) -> None:
    for result in failed:
        click.echo(f"{result.status}: {result.id}")
        for finding in result.findings:
            click.echo(f"    {finding.check}: {finding.message}")
