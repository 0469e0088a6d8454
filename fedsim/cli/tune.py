"""``fedsim tune``: equal budgets for all methods on validation data, winners on fresh seeds, and one comparison."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fedsim.cli.arguments import Arguments
from fedsim.cli.asjson import aside
from fedsim.cli.campaign import Campaign
from fedsim.cli.exits import DONE
from fedsim.cli.request import Tuning
from fedsim.cli.spaces import spaces
from fedsim.cli.trials import RECORD, SAMPLERS, text_of
from fedsim.errors import ConfigError


def tune(argv: Sequence[str]) -> int:
    """Choose settings of methods by validation data, each with the same number of trials; compare the winners."""
    args = _parsed(argv)
    found, common = spaces([word for word in args.settings if not word.startswith("-")])
    with aside(args.json):
        request = Tuning.of(found, common, args)
        if args.dry_run:
            facts, code = request.plan(), DONE
        else:
            from fedsim.cli.launch import jobs

            with jobs() as do:
                facts, code = Campaign(request, do).run()
    if args.json:
        print(text_of(facts), end="", flush=True)
    return code


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = Arguments(prog="fedsim tune", description=tune.__doc__)
    parser.add_argument(
        "settings", nargs="*", metavar="[METHOD:]KEY=VALUES", help="as in a sweep; METHOD: its own"
    )
    parser.add_argument("--trials", type=int, metavar="N", help="of each method; default: the smallest grid")
    parser.add_argument("--seeds", default="0", help="that trials are run on, as in 0,1 or 0-4; default: 0")
    parser.add_argument("--final-seeds", help="that winners are run on; default: the five after --seeds")
    parser.add_argument("--sampler", choices=SAMPLERS, default="grid", help="default: grid")
    parser.add_argument(
        "--extend", type=int, default=0, metavar="N", help="go up to N steps beyond the edges of the grid"
    )
    parser.add_argument("--config-dir", metavar="DIR", help="a folder with options of your own")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run, and stop")
    parser.add_argument("--json", action="store_true", help=f"print what {RECORD} holds, and nothing else")
    args = parser.parse_intermixed_args(list(argv))
    for name in ("trials", "extend"):
        least = 1 if name == "trials" else 0
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ConfigError(f"--{name} {getattr(args, name)}: must be at least {least}")
    for word in args.settings:
        if word.partition("=")[0].lstrip("+") in ("seed", "dir"):
            raise ConfigError(f"{word}: type --seeds and --final-seeds, or out= and name=, instead")
    return args
