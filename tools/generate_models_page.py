"""Tries every Mixture-of-Experts family of the installed transformers and writes docs/models.json and docs/models.md.

Run by `make models-page`; takes minutes. A test checks that the committed files still match transformers and the code.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moecluster.hf.modelling import text_config
from moecluster.models.native.build import register_native_family
from tools.family_trials import LOGIT_TOLERANCE, LOSS_TOLERANCE, STEPS, Trial, try_family
from tools.markdown import table
from tools.moe_families import families_with_interface, families_without_interface

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "models.json"
PAGE = ROOT / "docs" / "models.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="*", metavar="FAMILY", help="try these again, and keep what was found of others"
    )
    parser.add_argument("--page", action="store_true", help="try nothing: write the page from docs/models.json")
    asked = parser.parse_args()
    register_native_family()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    known = families_with_interface() + families_without_interface()
    found = {trial.family: trial for trial in read_results() if trial.family in known} if RESULTS.exists() else {}
    wanted = [] if asked.page else [family for family in known if not asked.only or family in asked.only]
    RESULTS.parent.mkdir(exist_ok=True)
    for family in wanted:
        with tempfile.TemporaryDirectory() as directory:
            trial = try_family(family, Path(directory))
        print(json.dumps(trial.to_table()), file=sys.stderr, flush=True)
        found[family] = trial
        trials = [found[name] for name in sorted(found)]
        content = {"transformers": transformers.__version__, "families": [each.to_table() for each in trials]}
        _replace(RESULTS, json.dumps(content, indent=2) + "\n")
    _replace(PAGE, page(read_results(), tried_version()))
    return int(any(trial.experts not in ("equal", "refused") for trial in found.values()))


def read_results() -> list[Trial]:
    return [Trial(**table) for table in json.loads(RESULTS.read_text(encoding="utf-8"))["families"]]


def tried_version() -> str:
    return str(json.loads(RESULTS.read_text(encoding="utf-8"))["transformers"])


def page(trials: Sequence[Trial], version: str) -> str:
    """Returns the page in Markdown."""
    opened = [trial for trial in trials if trial.experts != "refused"]
    refused = [trial for trial in trials if trial.experts == "refused"]
    equal = sum(trial.experts == "equal" for trial in opened)
    return "\n".join(
        [
            "# Families of models",
            "",
            "<!-- Written by tools/generate_models_page.py: run `make models-page`, do not edit. -->",
            "",
            f"What moecluster does with every Mixture-of-Experts family of transformers {version}, tried on a tiny",
            "random model of each. The name is the `model_type` in `config.json`. Beside these there is the native",
            "family, `moecluster`.",
            "",
            f"## Families that can be attached: {len(opened)}, of which {equal} equal transformers",
            "",
            f"- Experts: `equal` if the logits are those of transformers to {LOGIT_TOLERANCE:.0e} (float32), while",
            "  every expert is read from the checkpoint by itself and computed outside the model.",
            f"- Training: `equal` if {STEPS} steps of a run have the losses of a plain loop over transformers'",
            f"  model to {LOSS_TOLERANCE:.0e}, and transformers reads the same weights back from the run's checkpoint.",
            "- Texts: `continuous` is transformers' continuous batching. `padded` is `generate()`, and the logits of a",
            "  text behind padding were those of the text alone. `padded, equal lengths` batches only prompts of one",
            "  length, as padding changes what the family computes.",
            "",
            *table(
                ("Family", "Experts", "Training", "Texts", "Remarks"),
                ((f"`{t.family}`", t.experts, t.training, t.batching, _remarks(t)) for t in opened),
            ),
            "",
            f"## Families that are refused: {len(refused)}",
            "",
            "A checkpoint that is made of several models (it also sees, hears or speaks) is opened where transformers'",
            "`AutoModelForCausalLM` opens it, as the language model alone, and refused elsewhere.",
            "",
            *table(("Family", "Why"), ((f"`{t.family}`", t.reason) for t in refused)),
            "",
        ]
    )


def _remarks(trial: Trial) -> str:
    config_class = CONFIG_MAPPING[trial.family]
    if trial.reason or "text_config" not in config_class.sub_configs:
        return trial.reason
    if text_config(config_class()).model_type == trial.family:
        return "The whole model is opened; it takes text"
    return "The language model alone is opened; a trained checkpoint is that of a language model"


def _replace(path: Path, content: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(content, encoding="utf-8")
    os.replace(part, path)


if __name__ == "__main__":
    sys.exit(main())
