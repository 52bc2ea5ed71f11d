"""A page in the browser: choose a photo, move its age, smile and gender, download it.

    python demo.py                                                # http://127.0.0.1:7860, with the bundled models
    python demo.py --ckpt runs/faces/export.safetensors --encoder encoder.safetensors --boundaries fitted/

It answers this machine only unless --host says otherwise, loads nothing from other servers, and serves no file outside
a temporary folder of its own. Of a folder of boundaries it takes those that were fitted for the generator.
"""

from pathlib import Path

from common.cli import ArgumentParser, add_device_flags, count, positive, run_script, whole
from demo_app.flags import add_model_flags, given_model_flags, model_flags


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to answer at; 0.0.0.0: anybody in the network")
    add("--port", type=whole(1, 65535), default=7860, help="port to answer at")
    add("--max_upload_mb", type=positive, default=40, help="largest upload, in megabytes")
    add("--threads", type=count, default=0, help="CPU threads; 0: PyTorch's choice")
    add_model_flags(parser)
    add_device_flags(parser, distributed=False)
    return parser


def main(args) -> None:
    import tempfile
    import time

    import torch

    from common.distributed import resolve_device
    from demo_app.models import load_models
    from demo_app.serve import prepare, serve

    prepare()
    if args.threads:
        torch.set_num_threads(args.threads)
    models = load_models(resolve_device(args.device, ops=args.ops), **model_flags(args))
    with tempfile.TemporaryDirectory(prefix="wpp-demo-") as folder:
        how = {"host": args.host, "port": args.port, "max_upload_mb": args.max_upload_mb}
        blocks = serve(models, Path(folder), flags=given_model_flags(args), **how)
        print(f"{blocks.local_url} shows the page; Ctrl-C ends it", flush=True)
        try:
            while True:
                time.sleep(3600)
        finally:
            blocks.close()


if __name__ == "__main__":
    run_script(main, build_parser())
