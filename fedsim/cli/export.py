"""``fedsim export``: the model of a finished run as a file for other programs."""

from __future__ import annotations

import json
from collections.abc import Sequence

from fedsim.cli.arguments import Arguments, add_allow, check_runs, place

FORMATS = ("state_dict", "safetensors", "onnx", "hf")


def export(argv: Sequence[str]) -> int:
    """Write the model of a finished run as a file, with class names and normalisation beside it."""
    parser = Arguments(prog="fedsim export", description=export.__doc__)
    parser.add_argument("run", type=place, metavar="RUN", help="a run folder")
    parser.add_argument(
        "--to", choices=FORMATS, default="state_dict", help="default: state_dict (torch.save)"
    )
    parser.add_argument("--client", type=int, metavar="K", help="the personal model of client K")
    parser.add_argument(
        "--best", action="store_true", help="after the best round on validation data, not the last"
    )
    parser.add_argument(
        "--rank", type=int, metavar="R", help="with --to hf: adapters of rank R, the best by singular values"
    )
    parser.add_argument("--out", type=place, metavar="PATH", help="file, or folder; default: RUN/export/")
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    parser.add_argument("--json", action="store_true", help="say what was written as JSON")
    add_allow(parser)
    args = parser.parse_args(argv)
    check_runs([args.run], args.allow)
    from fedsim.run.formats import export as write
    from fedsim.run.result import load_run

    path = write(
        load_run(args.run),
        args.to,
        client=args.client,
        best=args.best,
        out=args.out,
        force=args.force,
        rank=args.rank,
    )
    facts = {"path": str(path), "to": args.to, "run": str(args.run), "client": args.client, "best": args.best}
    print(json.dumps(facts) if args.json else f"written: {path}", flush=True)
    return 0
