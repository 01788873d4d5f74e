"""The ``kexa`` command: ``doctor``, ``data``, ``run``, ``study``, ``plan``, ``notebooks``.

Exit codes: 0, 1 a notebook or a check failed, 2 a bad argument, config, data source or output
directory, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="kexa", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    doctor = commands.add_parser("doctor", help="what will be used on this machine, and why")
    doctor.add_argument("--profile", default="smoke", help="default: %(default)s")

    data = commands.add_parser("data", help="text: list, fetch, stats, synthesize")
    verbs = data.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="every data card, and whether its source is in the cache")
    for verb, text in (
        ("fetch", "fill the cache, so that later runs need no network"),
        ("stats", "bytes of each source, what each cleaning step removes, what the corpus keeps"),
    ):
        each = verbs.add_parser(verb, help=text)
        each.add_argument("--profile", default="smoke", help="default: %(default)s")
    synthesize = verbs.add_parser(
        "synthesize", help="write synthetic samples with generator, seed and source, as JSON lines"
    )
    synthesize.add_argument("--kind", required=True, help="thinking, problems, facts, ...")
    synthesize.add_argument("--count", type=int, default=60, help="default: %(default)s")
    synthesize.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    synthesize.add_argument("--out", required=True, metavar="FILE", help="a .jsonl file")
    synthesize.add_argument(
        "--endpoint", default="", metavar="URL", help="an OpenAI-compatible server, up to /v1"
    )
    synthesize.add_argument("--model", default="", help="its name on that server")
    synthesize.add_argument(
        "--profile", default="smoke", help="whose corpus is thought about; default: %(default)s"
    )

    run = commands.add_parser("run", help="run the notebooks that are not up to date")
    run.add_argument("--profile", default="smoke", help="a file in configs/, or a .toml path")
    chosen = run.add_mutually_exclusive_group()
    chosen.add_argument("--only", metavar="NN", help="this notebook, after what it needs")
    chosen.add_argument("--from", dest="first", metavar="NN", help="this notebook and all after")
    run.add_argument("--out", default="", metavar="DIR", help="default: runs/<profile>")
    run.add_argument("--force", action="store_true", help="run the chosen ones even if unchanged")
    run.add_argument(
        "-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
        help="set a parameter of the notebooks that have it: -p seed 1",
    )  # fmt: skip

    study = commands.add_parser("study", help="make the runs of a seeded comparison, and read them")
    study.add_argument("name", metavar="NAME", help="a study of configs/studies.toml")
    study.add_argument("--out", default="", metavar="DIR", help="default: studies/")
    study.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at a time; default: %(default)s"
    )
    study.add_argument(
        "--text", default="", metavar="FILE", help="keep the text here, or read what is kept here"
    )
    study.add_argument(
        "--check", action="store_true", help="a handful of steps per run, kept nowhere"
    )

    plan = commands.add_parser("plan", help="which layouts of pretraining fit on how many GPUs")
    plan.add_argument("--profile", default="full", help="default: %(default)s")
    plan.add_argument("--gpus", type=int, default=64, help="default: %(default)s")
    plan.add_argument(
        "--memory", type=float, default=80, metavar="GIB", help="of each; default: %(default)s"
    )

    notebooks = commands.add_parser("notebooks", help="the .py/.ipynb pairs")
    action = notebooks.add_mutually_exclusive_group(required=True)
    action.add_argument("--build", action="store_true", help="write every .ipynb from its .py")
    action.add_argument("--check", action="store_true", help="pairs agree, outputs are clean")
    action.add_argument("--readme", action="store_true", help="minutes of runs/ into README.md")
    action.add_argument(
        "--commit-outputs", metavar="PROFILE", help="take the outputs of a finished run"
    )

    options = parser.parse_args(arguments)
    from kexa.config import ConfigError
    from kexa.lock import Busy
    from kexa.pipeline import StageFailed
    from kexa.record import CannotWrite

    try:
        return COMMANDS[options.command](options)
    except StageFailed as error:
        print(f"kexa: {error}", file=sys.stderr)
        return 1
    except (ConfigError, Busy, CannotWrite) as error:
        print(f"kexa: {error}", file=sys.stderr)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        remedy = "free space, or choose another output directory"
        print(f"kexa: {where}{error.strerror}: {remedy}", file=sys.stderr)
    except KeyboardInterrupt:
        print("kexa: interrupted; run again to go on", file=sys.stderr)
        return 130
    return 2


def _doctor(options: argparse.Namespace) -> int:
    from kexa.doctor import report

    for line in report(options.profile):
        print(line)
    return 0


def _data(options: argparse.Namespace) -> int:
    from kexa import config
    from kexa.data import inventory, sources, synthesis
    from kexa.stages import synthetic_sources

    if options.verb == "list":
        lines = inventory.list_lines()
    elif options.verb == "fetch":
        profile = config.load(options.profile)
        names = [*profile.data.sources, *profile.data.evaluation, *profile.comparison.public]
        names += synthetic_sources(profile)
        lines = inventory.fetch_lines([sources.load_card(name) for name in dict.fromkeys(names)])
    elif options.verb == "synthesize":
        if bool(options.endpoint) != bool(options.model) or options.count < 1:
            raise config.ConfigError(
                f"--endpoint {options.endpoint!r}, --model {options.model!r}, --count "
                f"{options.count}: give both of the first or neither, and a count above 0"
            )
        endpoint = synthesis.Endpoint(options.endpoint, options.model) if options.endpoint else None
        data = config.load(options.profile).data
        lines = inventory.synthesize_lines(
            options.kind, options.count, options.seed, Path(options.out), endpoint, data
        )
    else:
        lines = inventory.stats_lines(config.load(options.profile).data)
    for line in lines:
        print(line)
    return 0


def _end_run(number: int, _frame: object) -> None:
    """End kernels (training saves its step first) and leave, with nothing to unwind.

    An exception that has to find its way out of papermill's event loop is sometimes lost there, or
    ends in a traceback of its own. A run may be killed at any moment, so nothing needs unwinding.
    """
    import psutil

    children = psutil.Process().children(recursive=True)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.terminate()
    for child in psutil.wait_procs(children, timeout=20)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    os.write(sys.stderr.fileno(), b"\nkexa: interrupted; run again to go on\n")
    os._exit(128 + number)


def _run(options: argparse.Namespace) -> int:
    from kexa import stages
    from kexa.config import ConfigError
    from kexa.pipeline import open_pipeline
    from kexa.report import write_report

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end_run)
    parameters = {name: _literal(value) for name, value in options.parameters}
    for name, flag in (("profile", "--profile"), ("out_dir", "--out")):
        if name in parameters:
            raise ConfigError(f"-p {name}: use {flag}")
    seed = parameters.pop("seed", 0)
    if type(seed) is not int:
        raise ConfigError(f"seed must be a whole number, got {seed!r}")
    pipeline = open_pipeline(options.profile, options.out, seed, parameters)
    everything = list(stages.table().values())
    if options.only:
        targets = [stages.find(options.only)]
    elif options.first:
        targets = everything[everything.index(stages.find(options.first)) :]
    else:
        targets = everything
    try:
        pipeline.run(targets, options.force)
    except BaseException:
        with contextlib.suppress(OSError):  # what stopped the run is the news
            write_report(pipeline)
        raise
    print(f"report: {write_report(pipeline)}")
    return 0


def _study(options: argparse.Namespace) -> int:
    import tempfile

    from kexa import study

    chosen = study.load(options.name)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(options.out or study.RESULTS)
        if options.check:
            chosen, out = study.shortened(chosen), Path(temporary)
        kept = Path(options.text) if options.text else None
        text = study.kept_text(chosen, kept) if kept else study.read_text(chosen)
        lines = study.run(chosen, text, out, options.jobs)
    for line in study.report(chosen, study.evaluate(chosen, lines)):
        print(line)
    return 0


def _plan(options: argparse.Namespace) -> int:
    from kexa import config
    from kexa.train.plan import GIB, report

    loaded = config.load(options.profile)
    for line in report(loaded, options.profile, options.gpus, options.memory * GIB):
        print(line)
    return 0


def _notebooks(options: argparse.Namespace) -> int:
    from kexa import pairs
    from kexa.config import ROOT

    if options.check:
        faults = pairs.check()
        for fault in faults:
            print(fault, file=sys.stderr)
        print(f"{len(pairs.sources())} notebook pairs, {len(faults)} faults")
        return int(bool(faults))
    if options.readme:
        from kexa.report import update_readme

        print(
            "README.md", "updated" if update_readme(ROOT / "README.md", ROOT / "runs") else "kept"
        )
        return 0
    changed = pairs.build()
    if options.commit_outputs:
        changed += pairs.commit_outputs(ROOT / "runs" / options.commit_outputs)
    for path in changed:
        print(f"wrote notebooks/{path.name}")
    return 0


def _literal(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


COMMANDS = {
    "doctor": _doctor,
    "data": _data,
    "run": _run,
    "study": _study,
    "plan": _plan,
    "notebooks": _notebooks,
}

if __name__ == "__main__":
    sys.exit(main())
