"""The text of `--help`: groups with their options, the keys of the primary config, examples. Read from the files.

The first comment line of an option's file says what it is; the comment behind a key of the primary config says what the
key does. Nothing is composed and nothing heavy imported.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from pathlib import Path

from smalti.commands import COMMANDS
from smalti.config import FOLDER, groups_of, options

EXAMPLES = {
    "train": {
        "python train.py": "a tiny TiTok on embedded images, minutes on two CPU cores",
        "python train.py data.path=~/photos": "the same on your own folder of images (one sub-folder a class)",
        "python train.py experiment=titok_s128 scale=paper data.path=DIR": "a published recipe",
        "python train.py experiment=titok_s128 stage=2 init_path=RUN/export": "its second stage",
        "python train.py experiment=gpt": "a tiny GPT on the tokens of a tiny tokenizer, which is trained first",
        "python train.py experiment=gpt tokenizer_path=DIR": "on those of a tokenizer of your own",
        "python train.py experiment=gpt_t2i text_encoder=google/flan-t5-small": "a tiny GPT by text, of captions",
        "python train.py -m experiment=titok optimizer.lr=1e-4,3e-4": "a sweep: a run for each value, then a table",
        "python train.py --cfg job": "print the composed config",
    },
    "evaluate": {
        "python evaluate.py model_path=runs/titok/tiny/export": "figures, a table and a picture",
        "python evaluate.py model_path=DIR data.path=~/photos": "on your own images",
        "python evaluate.py model_path=DIR lengths=all": "at 1, 2, 4, … tokens, with a plot beside JPEG, WebP, AVIF",
        "python evaluate.py model_path=DIR image=photo.jpg": "one photo: its reconstruction and its tokens",
        "python evaluate.py model_path=GENERATOR data.path=~/photos samples=5000": "a generator's samples",
        "python evaluate.py samples_path=adm.npz reference=FILE.npz": "samples of a file, by ADM's protocol",
        "python evaluate.py classifier=train data.image_size=64": "the classifier for figures without Inception",
    },
    "encode": {
        "python encode.py image=photo.jpg model_path=DIR output=photo.tok": "a photo as tokens, all of them",
        "python encode.py image=photo.jpg model_path=DIR output=photo.tok length=8": "its first 8",
        "python encode.py image=photo.jpg model_path=DIR output=photo.tok quality.psnr=24": "as few as give 24 dB",
        "python encode.py decode=photo.tok model_path=DIR output=photo.png": "and back",
        "python encode.py image=~/photos model_path=DIR output=tokens": "a folder, one file an image",
        "python encode.py data.path=~/photos model_path=DIR output=tokens": "token shards, to train generators on",
        "python encode.py data.path=~/photos model_path=VAE rescale=10000 output=DIR": "a VAE with its scale measured",
    },
    "generate": {
        "python generate.py model_path=runs/gpt/tiny/export": "one picture with samples of all classes",
        "python generate.py model_path=DIR labels=[3,7] num=8 sampling.guidance=2": "of two classes, more guided",
        'python generate.py model_path=DIR \'prompts=["a red circle","two stars"]\'': "of texts",
        "python generate.py model_path=DIR length=4": "from 4 tokens each, where the tokenizer decodes prefixes",
        "python generate.py model_path=DIR num=1000 output=samples": "a folder with a PNG each",
        "python generate.py model_path=DIR num=50000 output=adm.npz": "for ADM's evaluation suite",
    },
    "export": {
        "python export.py run=runs/titok/tiny output=models/mine": "a run of train.py, from its averaged weights",
        "python export.py source=titok checkpoint=FILE output=DIR": "a published file",
        "python export.py bridge=KL_EXPORT output=DIR data.path=DIR": "a continuous tokenizer, made discrete",
    },
}
FLAGS = {
    "-h, --help": "this text",
    "-m, --multirun": "a sweep over all keys with several values (a=1,2)",
    "-c, --cfg job": "print the composed config and stop",
    "--config-dir DIR": "a folder of your own configs beside those of smalti (DIR/experiment/mine.yaml, …)",
}


def text(command: str) -> str:
    """What `--help` of a command prints."""
    width = min(shutil.get_terminal_size().columns, 120)
    parts = [
        f"{command}: {COMMANDS[command]}.",
        "",
        f"Use: python {command}.py [key=value …]  (installed: smalti {command} …)",
    ]
    groups = groups_of(command)
    if groups:
        parts += ["", "Groups (group=option picks a file of configs/; * is the default)"]
        defaults = _defaults(command)
        for group in groups:
            parts += ["", f"  {group}="]
            found = {name: describe(FOLDER / group / f"{name}.yaml") for name in options(group)}
            marked = {f"{name}*" if name == defaults.get(group) else name: said for name, said in found.items()}
            parts += _table(marked, width, indent=4)
    parts += ["", "Keys (any key of the composed config can be set: section.key=value)", ""]
    parts += _table(keys(FOLDER / f"{command}.yaml"), width, indent=2)
    flags = {flag: said for flag, said in FLAGS.items() if command == "train" or "sweep" not in said}
    parts += ["", "Flags", "", *_table(flags, width, indent=2), "", "Examples", ""]
    for line, said in EXAMPLES[command].items():
        parts += [f"  {line}", f"      {said}"]
    parts += ["", "Exit codes: 0 done, 1 a bug of ours, 2 something you can put right (one line says what),"]
    parts += ["3 training diverged, 75 stopped by a signal with a checkpoint written (run the same command again)."]
    return "\n".join(parts)


def describe(file: Path) -> str:
    """The first sentence of the comment at the top of a config file."""
    lines: list[str] = []
    for line in file.read_text().splitlines():
        if not line.startswith("#"):
            if lines:
                break
            if line.strip():
                return ""
            continue
        said = line.lstrip("#").strip()
        if said.startswith("@package"):
            continue
        if not said and lines:
            break
        if said:
            lines.append(said)
    return re.split(r"(?<=[.;])\s+(?=[A-Z])", " ".join(lines), maxsplit=1)[0].strip().rstrip(".;:")


def keys(file: Path) -> dict[str, str]:
    """`key=value` of a primary config with the comment behind each; sections are written as dotted keys."""
    found: dict[str, str] = {}
    section = ""
    for line in file.read_text().splitlines():
        match = re.match(r"(\s*)([a-z_]+):\s*([^#]*?)\s*(?:#\s*(.*))?$", line)
        if not match or match[2] == "defaults":
            continue
        indent, name, value, said = match.groups()
        if not indent:
            section = name if not value else ""
        if value and said:
            full = f"{section}.{name}" if indent else name
            found[f"{full}={'…' if value == '???' else value}"] = said
    return found


def _defaults(command: str) -> dict[str, str]:
    """group → default option, as the defaults list of the primary config says."""
    text = (FOLDER / f"{command}.yaml").read_text()
    return {name: option for name, option in re.findall(r"^\s+- (\w+): ([\w-]+)", text, flags=re.MULTILINE)}


def _table(rows: dict[str, str], width: int, indent: int) -> list[str]:
    """Two columns, the second wrapped."""
    first = min(max(map(len, rows), default=0), 30)
    lines: list[str] = []
    for name, said in rows.items():
        wrapped = textwrap.wrap(said, max(width - indent - first - 2, 30)) or [""]
        if len(name) > first:
            lines.append(" " * indent + name)
        else:
            lines.append((" " * indent + name.ljust(first) + "  " + wrapped.pop(0)).rstrip())
        lines += [" " * (indent + first + 2) + rest for rest in wrapped]
    return lines
