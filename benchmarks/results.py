"""Results as files, and what became slower from one to another."""

import json
import statistics
from datetime import datetime, timezone
from pathlib import Path

FORMAT = 1
KINDS = ("kernels", "layers", "models")


class ResultError(ValueError):
    """A file that is not a result of this program, or two that cannot be compared."""


def make(kind, machine, settings, rows, **others):
    """The plain data of a run; a row has "case" and "peer", and "seconds" of every round."""
    return {
        "format": FORMAT,
        "kind": kind,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine,
        "settings": settings,
        **others,
        "rows": [{**row, **spread(row["seconds"])} for row in rows],
    }


def spread(seconds):
    """Median and quartiles; nothing of no rounds."""
    if not seconds:
        return {}
    if len(seconds) == 1:
        return {"median": seconds[0], "quartiles": [seconds[0], seconds[0]]}
    lower, middle, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median": middle, "quartiles": [lower, upper]}


def save(result, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(result, indent=1) + "\n")


def load(path):
    try:
        result = json.loads(Path(path).read_text())
    except OSError as error:
        raise ResultError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise ResultError(f"{path}: not JSON") from None
    if not isinstance(result, dict) or result.get("kind") not in KINDS:
        raise ResultError(f"{path}: not a result of `python -m benchmarks`")
    if result["format"] != FORMAT:
        raise ResultError(f"{path}: of format {result['format']}; this program reads {FORMAT}")
    return result


def compare(old, new, tolerance):
    """Of each row in both: {"case", "peer", "verdict", "ratio": old median / new median or None}.

    slower (faster): the median by more than `tolerance`, and the quartiles do not overlap.
    lost: it was right and is not any more. same: else. Rows that were not right before are left
    out.
    """
    if old["kind"] != new["kind"]:
        raise ResultError(f"results of {old['kind']} and of {new['kind']} cannot be compared")
    latest = {(row["case"], row["peer"]): row for row in new["rows"]}
    changes = []
    for row in old["rows"]:
        other = latest.get((row["case"], row["peer"]))
        if other is None or "median" not in row:
            continue
        verdict, ratio = "lost", None
        if "median" in other:
            verdict, ratio = _verdict(row, other, tolerance), row["median"] / other["median"]
        changes.append(
            {
                "case": row["case"],
                "peer": row["peer"],
                "verdict": verdict,
                "ratio": ratio,
                "note": other["note"] if verdict == "lost" else "",
            }
        )
    return changes


def _verdict(old, new, tolerance):
    if _longer(new, old, tolerance):
        return "slower"
    return "faster" if _longer(old, new, tolerance) else "same"


def _longer(one, other, tolerance):
    beyond = one["median"] > other["median"] * (1 + tolerance)
    return beyond and one["quartiles"][0] > other["quartiles"][1]
