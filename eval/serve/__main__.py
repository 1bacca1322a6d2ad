"""Serves a release beside its fallback over HTTP, as its rollout says: to try and to test, on one machine.

    python -m eval.serve --release FOLDER [--rollout FOLDER] [--log requests.jsonl] [--port 8000]

POST /generate {"prompt": ..., "new_tokens": 32, "key": ..., "stream": true}, POST /score {"text": ...}, GET
/metrics (Prometheus), GET /healthz (200 once it can answer). Release and fallback are processes of
their own; where the release's ends, the fallback answers what was open. Needs the extra `serve`;
docs/rollout.md has more.
"""

import argparse
import logging
from pathlib import Path

from eval.core.commands import count, new_parser, positive
from eval.core.errors import UserError, entry, require_one_of
from eval.release.contract_file import read_contract
from eval.serve.children import Child
from eval.serve.router import Router
from eval.signoff.keys import pems, read_trusted


def arguments() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("--release", required=True, type=Path, help="a folder that `eval.release` made")
    parser.add_argument("--target", help="of which the artifact is served (default: the first)")
    parser.add_argument(
        "--rollout", type=Path, help="folder of `eval.watch.rollout` (default: the release for all)"
    )
    parser.add_argument("--log", type=Path, metavar="JSONL", help="where requests are logged")
    about = "public keys, or files of allowed signers, of who may have signed the release"
    parser.add_argument("--public", nargs="+", metavar="FILE", help=about)
    about = "the same of all who sign the rollout's start and steps; these are trusted and no others"
    parser.add_argument("--rollout-key", nargs="+", metavar="FILE", help=about)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine alone)"
    )
    parser.add_argument("--port", type=count, default=8000, help="port to listen at (8000)")
    parser.add_argument("--open", type=count, default=256, help="requests that may be open at once (256)")
    about = "seconds without a word after which a model is started again (30)"
    parser.add_argument("--patience", type=positive, default=30.0, help=about)
    about = "seconds between two checks of the release's golden answers (60)"
    parser.add_argument("--golden", type=positive, default=60.0, help=about)
    return parser


@entry
def main() -> None:
    args = arguments().parse_args()
    try:
        import uvicorn

        from eval.serve.app import Log, Server
    except ModuleNotFoundError as error:
        raise UserError("serving", f"no module {error.name}", "pip install 'absorb[serve]'") from error
    logging.basicConfig(format="%(asctime)s %(name)s %(message)s")
    contract = read_contract(args.release)
    target = args.target or next(iter(contract.targets))
    require_one_of("--target", target, list(contract.targets))
    public, rollout_keys = (
        pems(read_trusted(paths)) if paths else None for paths in (args.public, args.rollout_key)
    )
    words = None if public is None else [key.decode() for key in public]
    given = {"release": str(args.release), "target": target, "public": words}
    release, fallback = (Child(arm, {**given, "arm": arm}, args.patience) for arm in ("release", "fallback"))
    router = Router(release, fallback, args.release, target, args.rollout, rollout_keys)
    app = Server(router, Log(args.log), args.open, args.golden).app()
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning", timeout_graceful_shutdown=10)


if __name__ == "__main__":
    main()
