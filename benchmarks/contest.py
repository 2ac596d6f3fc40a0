"""What layers and models share: a race of peers over cases, and the table of it."""

import sys
from dataclasses import asdict

from benchmarks import machine, race, results, tables
from benchmarks.peers import CALIBRATED, REFERENCE

OURS, FLOAT = "dynquant", "fp32"
FUSED, OURS_COMPILED, OURS_16_BIT = "dynquant_fused", "dynquant_compiled", "dynquant_16bit"


def run(kind, cases, options, limits, fresh=False):
    """The result (see results.make) of a race over {title: description} with these options."""
    facts = machine.facts()
    cache_bytes = machine.last_cache_bytes() if options.cold else None
    pythons = dict(options.python or [])
    names = list(dict.fromkeys(options.peers))
    with (
        race.workers(names, options.threads, options.spin, pythons) as racers,
        race.workers([REFERENCE], facts["cores_allowed"]) as references,
    ):
        exact = references[REFERENCE]
        if exact.facts["status"] != "ok":
            raise race.NoReference(f"nothing to compare results with: {exact.facts['note']}")
        rows = race.run(
            cases,
            racers,
            exact,
            options.rounds,
            limits,
            cache_bytes,
            progress(kind, options.quiet),
            fresh=fresh,
        )
        peers = {name: worker.facts for name, worker in racers.items()}
    settings = {
        "threads": options.threads,
        "rounds": options.rounds,
        "cold": options.cold,
        "spin": options.spin,
    }
    return results.make(
        kind, facts, settings, [asdict(row) for row in rows], peers=peers, cases=cases
    )


def progress(title, quiet):
    """A function that shows how far a list of steps is, on stderr, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return iter
    return lambda steps: tqdm(steps, desc=title, file=sys.stderr, disable=quiet, leave=False)


def by_case(result):
    """{case: {peer: row}} in the order of the run."""
    cases = {}
    for row in result["rows"]:
        cases.setdefault(row["case"], {})[row["peer"]] = row
    return cases


def best_peer(rows):
    """The fastest row that is right and not dynquant's, or None. fp32 and bf16 count too.

    What was calibrated with data does not.
    """
    right = [
        row
        for name, row in rows.items()
        if not name.startswith(OURS) and name not in CALIBRATED and "median" in row
    ]
    return min(right, key=lambda row: row["median"], default=None)


def ours_of(rows):
    """The row of dynquant that is compared with others, or None."""
    fused = rows.get(FUSED)
    return fused if fused is not None and "median" in fused else rows.get(OURS)


def ratio(rows, other):
    """How many times as fast as `other` dynquant is, as text; "" where one of them is missing.

    dynquant: fused, where it was raced so.
    """
    ours = ours_of(rows)
    if ours is None or other is None or "median" not in ours or "median" not in other:
        return ""
    return f"{other['median'] / ours['median']:.2f}"


def table(result, cell, corner, as_markdown=False):
    """Peers as columns: cell(case, row) of those that are right, else how they ended."""
    names = list(result["peers"])
    header = [corner, *names, "best peer", "/best", "/fp32"]
    lines = []
    for case, rows in by_case(result).items():
        best = best_peer(rows)
        lines.append(
            [
                case,
                *(_cell(case, rows[name], cell) for name in names),
                best["peer"] if best else "",
                ratio(rows, best),
                ratio(rows, rows.get(FLOAT)),
            ]
        )
    return tables.of(header, lines, as_markdown)


def _cell(case, row, cell):
    if "median" not in row:
        return row["status"]
    lower, upper = row["quartiles"]
    return f"{cell(case, row)} ±{100 * (upper - lower) / 2 / row['median']:.0f}%"


def notes(result):
    """A line for each thing to know of a peer, with the cases that it is true of."""
    found = {}
    for row in result["rows"]:
        if row["note"]:
            key = row["peer"], row["status"], row["note"]
            found.setdefault(key, []).append(row["case"])
    every = len(by_case(result))
    lines = []
    for (peer, status, note), cases in found.items():
        where = "" if len(cases) == every else f" ({', '.join(cases)})"
        lines.append(f"{peer}: {'' if status == 'ok' else status + ': '}{note}{where}")
    return lines


def heading(result):
    """Two lines: the machine, and how it was measured."""
    isa = result.get("peers", {}).get(OURS, {}).get("isa")
    parts = [how(result), f"{result['settings']['rounds']} rounds"]
    parts += [f"dynquant on {isa}"] if isa else []
    return [machine.summary(result["machine"]), ", ".join(parts)]


def how(result):
    settings = result["settings"]
    parts = [f"{settings['threads']} thread{'s' * (settings['threads'] > 1)}"]
    if "cold" in settings:
        parts.append("cold caches" if settings["cold"] else "warm caches")
    if settings.get("spin"):
        parts.append("waiting threads may spin")
    return ", ".join(parts)
