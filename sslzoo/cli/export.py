"""Export a trained encoder for other libraries.

The file is loaded in a process without sslzoo before it is published; the largest difference of features is printed
and recorded in the model card next to the file. `sslzoo.load_backbone(RUN)` gives the encoder in Python.

  sslzoo export runs/RECIPE/ID --format hf
  sslzoo export step=000001200.ckpt --format onnx --out encoders

exit codes: 0 done; 1 the file does not reproduce the encoder's features, nothing is published; 2 invalid run,
checkpoint, recipe or format.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

FORMATS = ("safetensors", "timm", "torchvision", "onnx", "hf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        type=Path,
        metavar="RUN|CHECKPOINT",
        help="a run directory (its newest checkpoint), a checkpoint, or an exported backbone.safetensors",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="safetensors",
        help="safetensors: weights, preprocessing and run; timm, torchvision: weights by that library's names; onnx: "
        "the computation graph; hf: timm's folder for the Hugging Face Hub (default: safetensors)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder (default: exported/ in the run directory, or next to the file)",
    )
    parser.add_argument(
        "--with-projector", action="store_true", help="backbone and projector; for safetensors and onnx"
    )
    parser.add_argument(
        "--recipe", help="bundled name or file (default: the recipe of the run, or the one in the checkpoint)"
    )


def run(args: argparse.Namespace) -> int:
    from sslzoo.export.verify import VerificationError
    from sslzoo.export.write import export

    try:
        done = export(
            args.path,
            args.format,
            out=args.out,
            recipe=args.recipe,
            with_projector=args.with_projector,
        )
    except (ValueError, OSError) as error:
        print(f"sslzoo export: {error}", file=sys.stderr)
        return 2
    except VerificationError as error:
        print(f"sslzoo export: {error}; nothing was published", file=sys.stderr)
        return 1
    print(f"{done.path}\n{done.card}\n{done.verified.sentence}")
    return 0
