"""The command ``mmllm plan``. What it needs is imported when it runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmllm.config.base import BuildContext
    from mmllm.config.run import RunConfig


def plan_options(sub: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """The options of `mmllm plan`; those that are given become a ``Setting``. ``positive`` reads a whole number above zero."""
    given: dict[str, Any] = {"default": argparse.SUPPRESS}
    sub.add_argument("--json", action="store_true", help="print JSON: everything")
    sub.add_argument("--details", action="store_true", help="also memory and operations by part, and what is assumed")
    sub.add_argument("--quick", action="store_true", help="parts and parameters alone: nothing is rehearsed")
    sub.add_argument("--svg", metavar="FILE", help="write a diagram of the system")
    sub.add_argument("--fit", metavar="SIZE", help="propose settings that fit a device's memory, such as 24GB")
    sub.add_argument("--devices", type=positive, help="how many; default 1", **given)
    sub.add_argument("--sharding", choices=["none", "ddp", "zero-2", "zero-3", "fsdp"], **given)
    sub.add_argument("--device", help="h100, a100-80gb (default), rtx-4090, …; a wrong one lists them", **given)
    sub.add_argument("--utilisation", type=float, help="share of the device's peak, 0 to 1; default 0.4", **given)
    sub.add_argument("--length", type=positive, help="tokens of a sample; default: the stage's max_length", **given)
    sub.add_argument("--supervised", type=float, help="share of a sample's text that is learned; default 1", **given)
    sub.add_argument("--context", type=positive, help="tokens of a conversation at inference", **given)
    sub.add_argument("--samples", type=positive, help="samples of a stage, where its data are not there", **given)


def run_plan(config: RunConfig, context: BuildContext, options: argparse.Namespace) -> int:
    """Print the plan that ``options`` ask for; the command's exit code."""
    from dataclasses import fields

    from mmllm.plan import Setting, make_plan, render

    given = {f.name: getattr(options, f.name) for f in fields(Setting) if hasattr(options, f.name)}
    if given.get("devices", 1) > 1:
        given.setdefault("sharding", "ddp")
    setting = Setting(**given)
    if options.fit is not None:
        from mmllm.plan.fit import fit, parse_size, render_fit

        proposals = fit(config, context, setting, parse_size(options.fit))
        if options.json:
            print(json.dumps([proposal.to_json() for proposal in proposals], indent=2))
        else:
            print(render_fit(proposals, setting, options.fit))
        return 0 if proposals else 1
    plan = make_plan(config, context, setting, costs=not options.quick)
    if options.svg is not None:
        from mmllm.plan.svg import draw

        Path(options.svg).write_text(draw(plan, config), encoding="utf-8")
    print(json.dumps(plan.to_json(), indent=2) if options.json else render(plan, config, details=options.details))
    return 0
