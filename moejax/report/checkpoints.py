"""The tables that ``moejax verify`` and ``moejax doctor`` print."""

from rich.table import Table

from moejax.report.schema import DoctorReport, VerificationReport
from moejax.report.visible import PlainTable, cell


def verification_table(report: VerificationReport) -> Table:
    """A table of the dictionary of :meth:`moejax.checkpoints.verify.Verification.to_dict`."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    batch, length = report["tokens"]
    table = PlainTable("compared with transformers", report["dtype"], title=report["model"], caption=versions)
    table.add_row("tokens", f"{batch} x {length}")
    table.add_row("relative rms of logits", f"{report['relative_rms']:.2e}")
    table.add_row("largest difference", f"{report['max_difference']:.2e}")
    table.add_row("same most likely token", f"{report['argmax_agreement']:.2%}")
    routing = report["routing_agreement"]
    if routing:
        worst = min(range(len(routing)), key=routing.__getitem__)
        table.add_row(
            "same experts", f"{sum(routing) / len(routing):.2%} (least: {routing[worst]:.2%}, mixture {worst})"
        )
    for kind, error in report.get("quantisation", {}).items():
        table.add_row(f"relative rms of rounding {kind}", f"{error:.2%}")
    for path, count in report["nonfinite"].items():
        table.add_row(f"NaN or infinite in {path}", str(count))
    verdicts = {
        True: cell("the same", "green"),
        False: cell("not the same", "red"),
        None: "unknown: " + ("experts were rounded" if report.get("quantisation") else "the dtype is too coarse"),
    }
    table.add_row("verdict", verdicts[report["passed"]])
    return table


def doctor_tables(report: DoctorReport) -> list[Table]:
    """Tables of versions, devices and memory; the report is what :func:`moejax.checkpoints.doctor.examine` returns."""
    versions = PlainTable("package", "version")
    versions.add_row("python", report["python"])
    for name, version in report["versions"].items():
        versions.add_row(name, version or "not installed")
    devices = PlainTable("device", "memory", "in use")
    for device in report["devices"]:
        name = f"{device['platform']}:{device['id']} {device['kind']}"
        devices.add_row(name, _gib(device["bytes"]), _gib(device["used"]))
    return [versions, devices, *([_model_table(report)] if "model" in report else [])]


def _model_table(report: DoctorReport) -> Table:
    """Memory of the parts of the model (rows) in each dtype (columns), and its share of the first device's memory."""
    config, memory = report.get("config"), report.get("memory")
    assert config is not None
    assert memory is not None
    experts = f"{config['num_experts']} experts, {config['num_experts_per_tok']} used for a token"
    about = f"{config['num_hidden_layers']} layers, {experts if config['num_experts'] else 'all dense'}"
    table = PlainTable("weights", *(column["dtype"] for column in memory), title=f"{report.get('model')}: {about}")
    if config["num_experts"]:
        largest = [max(column["layers"], key=lambda layer: layer["experts"]) for column in memory]
        table.add_row("largest MoE layer", *(_gib(column["largest_moe_layer"]) for column in memory))
        table.add_row("  its experts", *(_gib(layer["experts"]) for layer in largest))
        table.add_row("  experts of one token", *(_gib(layer["active"]) for layer in largest))
    table.add_row("all layers", *(_gib(column["total"] - column["outer"]) for column in memory))
    table.add_row("embedding, norm and head", *(_gib(column["outer"]) for column in memory))
    table.add_row("model", *(_gib(column["total"]) for column in memory), style="bold")
    table.add_row("cache of 1,000 tokens", *(_gib(1000 * column["cache_per_token"]) for column in memory))
    available = report["devices"][0]["bytes"]
    if available:
        table.add_row("share of the device's memory", *(f"{column['total'] / available:.0%}" for column in memory))
    return table


def _gib(size: int | None) -> str:
    """A number of bytes in GiB or MiB."""
    if size is None:
        return "unknown"
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
