"""Model card of an export, in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sslzoo.evaluate.figures import data_of, is_accuracy
from sslzoo.export.formats import Format
from sslzoo.export.verify import Verified
from sslzoo.nn.backbones import parameter_count

_FRONT = """\
---
library_name: timm
pipeline_tag: image-feature-extraction
tags: [self-supervised, sslzoo]
---
"""


def card(form: Format, verified: Verified | None) -> str:
    """The card of ``form``'s file; ``verified`` is None if the file has not been verified yet."""
    front = _FRONT if form.name == "hf" else ""
    return front + "\n".join(_lines(form, verified)) + "\n"


def _lines(form: Format, verified: Verified | None) -> Iterator[str]:
    about = form.encoder.about
    recipe = about.values
    yield f"# {recipe['name']}: {about.backbone.name} trained by {recipe['method']['name']}"
    yield from ["", f"An image encoder, trained without labels on {recipe['data']['dataset']} by sslzoo."]
    yield from ["", "## Use", "", "```python", form.code(), "```", ""]
    yield _preprocessing(form)
    yield ""
    unverified = "not verified yet; `sslzoo export RUN --format safetensors` does that"
    sentence = unverified if verified is None else verified.sentence
    yield f"{sentence[0].upper()}{sentence[1:]}."
    yield from ["", "## Details", "", "| | |", "|---|---|"]
    yield from (f"| {name} | {value} |" for name, value in _facts(form, recipe))
    yield from ["", "## Evaluation", ""]
    yield from _results(about.results)
    yield from ["", "## Recipe", "", "```yaml", about.recipe.rstrip(), "```"]


def _preprocessing(form: Format) -> str:
    transform = form.encoder.about.preprocessing
    colours = {1: "Grey images", 3: "RGB images"}.get(
        transform.channels, f"Images of {transform.channels} channels"
    )
    resized = f"shorter side resized to {transform.resize} px ({transform.interpolation}, antialiased), "
    text = (
        f"{colours}: {resized if transform.resize else ''}central square of {transform.size} px, values in [0, 1] "
        f"normalised by mean {list(transform.mean)} and std {list(transform.std)}."
    )
    if form.name == "hf" and not transform.resize:
        text += " timm's own transform also resizes images of another size."
    return text


def _facts(form: Format, recipe: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    encoder, about = form.encoder, form.encoder.about
    backbone, data, run = about.backbone, recipe["data"], about.run
    stem = "" if backbone.stem == "imagenet" else f", stem {backbone.stem}"
    million = parameter_count(encoder.backbone) / 1e6
    yield (
        "encoder",
        f"{backbone.name}{stem}, {backbone.in_channels} channel{'s' * (backbone.in_channels > 1)}, "
        f"{about.features} features, {million:.2f} M parameters",
    )
    if about.projector:
        yield "projector", f"{' - '.join(map(str, about.projector))}; its output is what the file computes"
    yield "method", recipe["method"]["name"]
    yield "data", f"{data['dataset']}, split {data['split']}"
    if "data_fingerprint" in run:
        yield "data fingerprint", f"`{run['data_fingerprint']}`"
    yield (
        "training",
        f"step {about.step:,} of a run of {recipe['trainer'].get('max_epochs')} epochs, "
        f"{data['global_batch_size']} images a step, {recipe['optim']['name']}, seed {recipe['seed']}",
    )
    if "run_id" in run:
        yield "run", f"{run['run_id']}, started {run.get('started', 'at an unknown time')}"
    if "versions" in run:
        yield "made with", ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    if run.get("git"):
        changed = ", with changes" if run["git"].get("dirty") else ""
        yield "commit", f"{run['git'].get('commit')}{changed}"


def _results(results: Mapping[str, Any]) -> Iterator[str]:
    """The accuracies in ``eval/summary.json``, with their intervals and numbers of test images, and how they were
    measured."""
    accuracies = {key: value for key, value in results.items() if is_accuracy(key)}
    intervals, sets = results.get("interval_95"), results.get("data_sets")
    if not (accuracies and intervals and sets):
        yield "Not measured at this step."
        return
    first = next(iter(sets))
    yield from ["| figure | % | 95 % interval | test images |", "|---|---|---|---|"]
    for key, value in accuracies.items():
        low, high = intervals[key]
        samples = sets[data_of(key, first)]["n_test"]
        yield f"| {key} | {100 * value:.1f} | {100 * low:.1f} to {100 * high:.1f} | {samples:,} |"
    for of in sets.values():
        yield from ["", f"{of['dataset']}: {of['protocol']}"]
