"""Pictures of results, by Matplotlib."""

from itertools import cycle
from pathlib import Path

from benchmarks import contest, layers, machine


class MatplotlibMissing(RuntimeError):
    """There is nothing to draw with."""


def _pyplot():
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise MatplotlibMissing("--plot needs Matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def check():
    """Raises before anything is measured where no picture could be drawn."""
    _pyplot()


def save(result, path):
    """Draws a result of any kind."""
    figure = {"kernels": _roofline, "layers": _layers, "models": _models}[result["kind"]](result)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    _pyplot().close(figure)


def _roofline(result):
    """A panel for each set: operations a second over operations for each byte of weights."""
    roofs = result["roofs"]
    columns = min(2, len(roofs))
    lines = -(-len(roofs) // columns)
    figure, axes = _pyplot().subplots(
        lines,
        columns,
        figsize=(5.5 * columns + 1.5, 4.2 * lines),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(roofs) :]:
        axis.set_axis_off()
    cases = list(dict.fromkeys(row["case"] for row in result["rows"]))
    colors = dict(zip(cases, cycle(_pyplot().get_cmap("tab20").colors), strict=False))
    for axis, (name, roof) in zip(axes.flat, roofs.items(), strict=False):
        rows = [row for row in result["rows"] if row["peer"] == name and "median" in row]
        intensity = [row["operations"] / row["bytes"] for row in rows] or [2]
        low, high = min(intensity) / 1.5, max(intensity) * 1.5
        for level, rate in roof["read"].items():
            ridge = min(roof["peak"] / rate, high)
            if ridge <= low:
                continue  # no limit to so slow a product
            axis.plot(
                [low, ridge],
                [rate * low / 1e9, rate * ridge / 1e9],
                lw=1,
                label=f"{level} {rate / 1e9:.0f} GB/s",
            )
        axis.hlines(
            roof["peak"] / 1e9,
            low,
            high,
            color="black",
            lw=1,
            label=f"peak {roof['peak'] / 1e9:.0f} GOP/s",
        )
        for row, x in zip(rows, intensity, strict=False):
            y = row["operations"] / row["median"] / 1e9
            axis.plot(x, y, "o", color=colors[row["case"]], ms=5)
        axis.set(xscale="log", yscale="log", title=name)
        axis.set_xlabel("operations for each byte of packed weight")
        axis.set_ylabel("GOP/s")
        axis.legend(fontsize=7, loc="lower right")
    points = [figure.axes[0].plot([], [], "o", color=color)[0] for color in colors.values()]
    figure.legend(points, cases, title="MxNxK", fontsize=7, loc="outside right center")
    return _finish(figure, result, "one thread, quantization and epilogue included")


def _layers(result):
    figure = _bars(result, layers.gops, "GOP/s")
    return _finish(figure, result, contest.how(result))


def _models(result):
    def times_fp32(case, row):
        return contest.by_case(result)[case]["fp32"]["median"] / row["median"]

    def per_second(case, row):
        return 1 / row["median"]

    rows = contest.by_case(result).values()
    if all("median" in row.get("fp32", {}) for row in rows):
        figure = _bars(result, times_fp32, "times as fast as fp32")
    else:
        figure = _bars(result, per_second, "calls a second")
    return _finish(figure, result, contest.how(result))


def _bars(result, value, label):
    """A group of bars for each case, a bar with its quartiles for each peer that is right."""
    cases = contest.by_case(result)
    names = [
        name for name in result["peers"] if any("median" in rows[name] for rows in cases.values())
    ]
    inches = max(7, 1.3 * len(cases) + 2)
    figure, axis = _pyplot().subplots(figsize=(inches, 4.6), layout="constrained")
    colors = _pyplot().get_cmap("tab20").colors
    width = 0.85 / max(1, len(names))
    for i, name in enumerate(names):
        places, heights, low, high = [], [], [], []
        for place, (case, rows) in enumerate(cases.items()):
            row = rows[name]
            if "median" not in row:
                continue
            middle = value(case, row)
            places.append(place + (i - (len(names) - 1) / 2) * width)
            heights.append(middle)
            low.append(middle * (1 - row["median"] / row["quartiles"][1]))
            high.append(middle * (row["median"] / row["quartiles"][0] - 1))
        ours = {
            contest.OURS: "black",
            contest.FUSED: "black",
            contest.OURS_COMPILED: "dimgray",
            contest.OURS_16_BIT: "darkgray",
        }
        color = ours.get(name, colors[i % len(colors)])
        axis.bar(
            places, heights, width, yerr=[low, high], label=name, color=color, error_kw={"lw": 0.6}
        )
    axis.set_xticks(range(len(cases)), list(cases), rotation=30, ha="right", fontsize=8)
    axis.set_ylabel(label)
    figure.legend(fontsize=7, loc="outside right center")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _finish(figure, result, how):
    figure.suptitle(f"{how}\n{machine.summary(result['machine'])}", fontsize=8)
    return figure
