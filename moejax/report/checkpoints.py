"""Tables of what ``moejax verify`` and ``moejax doctor`` found."""

from typing import Any

from rich.table import Table


def verification_table(found: dict[str, Any]) -> Table:
    """What :meth:`moejax.checkpoints.verify.Verification.to_dict` says."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    batch, length = found["tokens"]
    table = Table("compared with transformers", found["dtype"], title=found["model"], caption=versions)
    table.add_row("tokens", f"{batch} x {length}")
    table.add_row("relative rms of logits", f"{found['relative_rms']:.2e}")
    table.add_row("largest difference", f"{found['max_difference']:.2e}")
    table.add_row("same most likely token", f"{found['argmax_agreement']:.2%}")
    routing = found["routing_agreement"]
    if routing:
        worst = min(range(len(routing)), key=routing.__getitem__)
        table.add_row("same experts", f"{sum(routing) / len(routing):.2%} (least: {routing[worst]:.2%}, {worst})")
    for path, count in found["nonfinite"].items():
        table.add_row(f"NaN or infinite in {path}", str(count))
    verdicts = {True: "[green]the same[/green]", False: "[red]not the same[/red]", None: "none: too coarse to tell"}
    table.add_row("verdict", verdicts[found["passed"]])
    return table


def doctor_tables(found: dict[str, Any]) -> list[Table]:
    """What :func:`moejax.checkpoints.doctor.examine` says."""
    versions = Table("package", "version")
    versions.add_row("python", found["python"])
    for name, version in found["versions"].items():
        versions.add_row(name, version or "not installed")
    devices = Table("device", "memory", "in use")
    for device in found["devices"]:
        name = f"{device['platform']}:{device['id']} {device['kind']}"
        devices.add_row(name, _gib(device["bytes"]), _gib(device["used"]))
    return [versions, devices, *([_model_table(found)] if "model" in found else [])]


def _model_table(found: dict[str, Any]) -> Table:
    """Rows are parts of the model, columns dtypes, each beside the first device's memory."""
    config, memory = found["config"], found["memory"]
    experts = f"{config['num_experts']} experts of which {config['num_experts_per_tok']} are used"
    about = f"{config['num_hidden_layers']} layers, {experts if config['num_experts'] else 'all dense'}"
    table = Table("weights", *(column["dtype"] for column in memory), title=f"{found['model']}: {about}")
    if config["num_experts"]:
        largest = [max(column["layers"], key=lambda layer: layer["experts"]) for column in memory]
        table.add_row("largest MoE layer", *(_gib(column["largest_moe_layer"]) for column in memory))
        table.add_row("  its experts", *(_gib(layer["experts"]) for layer in largest))
        table.add_row("  of which a token uses", *(_gib(layer["active"]) for layer in largest))
    table.add_row("all layers", *(_gib(column["total"] - column["outer"]) for column in memory))
    table.add_row("embedding, norm and head", *(_gib(column["outer"]) for column in memory))
    table.add_row("model", *(_gib(column["total"]) for column in memory), style="bold")
    table.add_row("cache of 1,000 tokens", *(_gib(1000 * column["cache_per_token"]) for column in memory))
    available = found["devices"][0]["bytes"]
    if available:
        table.add_row("of the device's memory", *(f"{column['total'] / available:.0%}" for column in memory))
    return table


def _gib(size: int | None) -> str:
    if size is None:
        return "unknown"
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
