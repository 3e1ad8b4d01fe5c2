"""What a user can get wrong: exit code 2, one line that names the key and the way out, nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# command line (PLACE in braces is a path of the fixture `places`), and a part of the line that it must end with
BAD_LINES = [
    # keys
    ("train optimizer.lrr=1e-3", "optimizer.lrr is not a key of this config; did you mean 'optimizer.lr'?"),
    ("train lr=1e-3", "did you mean 'optimizer.lr'?"),
    ("train optimiser.lr=1e-3", "did you mean 'optimizer.lr'?"),
    ("train tokenizer.encoder.widht=64", "did you mean 'tokenizer.encoder.width'?"),
    ("train nothing.like.this=1", "nothing.like.this is not a key of this config; the top level has tokenizer, obj"),
    ("train optimizer.lr.x=3", "optimizer.lr is a value, not a section"),
    ("train +foo=1", "foo is not a key of this config"),
    ("train +seed=1", "the key exists; write seed=… without the plus"),
    ("train ~optimizer.clip", "keys cannot be removed; use optimizer.clip=null"),
    ("train hydra.run.dir=elsewhere", "of Hydra's own keys only hydra.launcher.* and hydra.sweeper.* can be set here"),
    ("train hydra.launcher.jobs=3", "hydra.launcher.jobs"),
    # groups and options
    ("train experiment=titk", "experiment=titk is unknown; did you mean 'titok'? possible: "),
    ("train experiment=null", "experiment=null is unknown; possible: "),
    ("train tokenizer=titoc", "did you mean 'titok'?"),
    ("train scale=huge", "scale=huge is unknown; possible: paper, small, tiny"),
    ("train optimizer=sgd", "optimizer=sgd is unknown; possible: adamw"),
    ("train tokenizer/quantizer=kl2", "did you mean 'kl'?"),
    ("train tokenizer.quantizer=kl", "write tokenizer/quantizer=kl"),
    ("train objective.perceptual=lpips", "write objective/perceptual=lpips"),
    ("evaluate model_path={photos} optimizer=adamw", "optimizer is not a group of `evaluate`; it has data"),
    # the form of a line
    ("train titok", "'titok' is not key=value; did you mean experiment=titok?"),
    ("train optimizer.lr = 3", "'optimizer.lr' is not key=value (without spaces around '='), such as experiment="),
    ("train --experiment=titok", "did you mean experiment=titok?"),
    ("train --hlp", "did you mean '--help'?"),
    ("train --cfg all", "use --cfg job"),
    ("train optimizer.lr=", "optimizer.lr= has no value"),
    ("train tokenizer.head=my(head)", "Unknown function 'my'"),
    ("train data.path=/my(photos)", "data.path=/my(photos) does not exist; check the path"),
    ("train optimizer.betas=[0.9", "cannot be read"),
    ("train optimizer.lr=1e-4,3e-4", "add -m for a sweep"),
    ("train optimizer.lr=${nowhere}", "optimizer.lr: Interpolation key 'nowhere' not found"),
    ("train --config-dir {missing}", "is not a folder"),
    ("evaluate -m model_path={photos}", "only `train` sweeps"),
    # types
    ("train optimizer.lr=fast", "optimizer.lr=fast is text, but it needs a number, such as 0.0"),
    ("train trainer.max_steps=10.5", "trainer.max_steps=10.5 is a number, but it needs a whole number"),
    ("train tokenizer.encoder.width=64.0", "needs a whole number"),
    ("train seed=null", "seed=null, but it needs a whole number"),
    ("train trainer.compile=1", "trainer.compile=1 is a whole number, but it needs true or false"),
    ("train data.flip=maybe", "needs true or false"),
    ("train optimizer.betas=0.9", "needs a list"),
    ("train optimizer.betas=[0.9,b]", "optimizer.betas[1]=b is text, but it needs a number"),
    ("train optimizer.clip=often", "optimizer.clip=often is text, but it needs a number"),
    ("train tokenizer.encoder=12", "tokenizer.encoder is a section; set one of its keys: width, depth"),
    ("train tokenizer.encoder=null", "tokenizer.encoder=null, but it needs a section"),
    ("train output=2024", "output=2024 is a whole number, but it needs text"),
    ("train init_path=5", "init_path=5 is a whole number, but it needs text"),
    # values
    ("train trainer.max_steps=0", "trainer.max_steps=0 must be at least 1"),
    ("train tokenizer.num_latent_tokens=-3", "tokenizer.num_latent_tokens=-3 must be at least 1"),
    ("train data.batch_size=-8", "data.batch_size=-8 must be at least 1"),
    ("train optimizer.lr=-1e-3", "optimizer.lr=-0.001 must not be negative"),
    ("train optimizer.lr=.nan", "optimizer.lr=.nan is text"),
    ("train optimizer.lr=nan", "optimizer.lr=nan is not a finite number"),
    ("train optimizer.betas=[0.9,1.2]", "optimizer.betas=[0.9,1.2] must lie in [0, 1)"),
    ("train optimizer.betas=[0.9]", "must be two numbers"),
    ("train optimizer.clip=0", "optimizer.clip=0 must be above 0; null switches it off"),
    ("train ema.decay=1.0", "ema.decay=1.0 must lie in [0, 1)"),
    ("train checkpoint.keep=1", "checkpoint.keep=1 must be at least 2"),
    ("train data.image_size=100 data.resize=100 tokenizer.encoder.patch_size=8", "patch_size=8; use 96 or 104"),
    ("train data.image_size=128 data.resize=64", "data.resize=64 is smaller than the crop"),
    ("train tokenizer.image_size=32 data.image_size=64", "data.image_size=64; set only the latter"),
    ("train tokenizer.decoder.width=128 tokenizer.decoder.heads=3", "heads=3; use 126 or 129"),
    ("train data.batch_size=30 trainer.devices=4", "data.batch_size=30 is not divisible by 4 = trainer.devices 4 × "),
    ("train data.batch_size=32 trainer.devices=1 trainer.accumulate=3", "use 30 or 33"),
    ("train trainer.devices=many", "trainer.devices=many must be a number of processes from 1, or auto"),
    ("train resume=maybe", "resume=maybe is unknown; possible: auto, never, must"),
    ("train resume=must", "resume=must, but there is no run in runs"),
    ("train optimizer.schedule=cosin", "did you mean 'cosine'; possible: cosine, constant"),
    ("train trainer.precision=64", "trainer.precision=64 is a whole number, but it needs text"),
    ("train stage=2", "stage=2: experiment=titok has one stage; with two: "),
    ("train experiment=titok_s128 stage=3", "stage=3 is not a stage; use stage=1 or stage=2"),
    ("train experiment=titok_s128_stage2 stage=1", "use experiment=titok_s128 for stage 1"),
    ("train experiment=titok_s128 scale=paper", "teacher_path is required: an export of experiment=maskgit_vqgan"),
    ("train tokenizer._target_=os.system", "tokenizer._target_=os.system is not allowed"),
    # paths
    ("train data.path={missing}", "does not exist; did you mean 'photos'?"),
    ("train data.path={empty}", "holds no images and no .tar shards"),
    ("train data.path={texts}", "holds no images and no .tar shards"),
    ("train data.path={file}", "is a file; give a .tar shard"),
    ("train data.path={photos} data.val_path={empty}", "data.val_path="),
    ("train output={file}/runs", "is not one; choose another output"),
    ("train output=/proc/version/runs", "is not one; choose another output"),
    ("train run={full}", "holds something else than a run (no config.yaml)"),
    ("train init_path={photos}", "is not an export (no config.json)"),
    ("train init_path={missing}", "does not exist"),
    ("train teacher_path={file}", "is a file; give the folder of an export"),
    # generators
    ("train experiment=gpt scale=paper", "tokenizer_path is required: an export of experiment="),
    ("train experiment=gpt tokenizer_path={photos}", "tokenizer_path={photos} is not an export (no config.json)"),
    ("train experiment=gpt tokenizer_path={missing}", "does not exist; did you mean 'photos'?"),
    ("train experiment=gpt tokenizer=titok", "tokenizer is given, but this run trains a generator; leave tokenizer=…"),
    ("train experiment=gpt objective=pixels", "objective is given, but this run trains a generator"),
    ("train generator=gpt", "tokenizer is given, but this run trains a generator"),
    ("train tokenizer=frozen", "tokenizer and generator are both null; pick what to train"),
    ("train experiment=gpt tokenizer.image_size=32", "the tokenizer is the one of tokenizer_path, as it is"),
    ("train tokenizer_path={export}", "tokenizer_path={export} is for generators, but this run trains a tokenizer"),
    ("train experiment=gpt stage=2", "stage=2: experiment=gpt has one stage"),
    ("train experiment=gpt generator.width=100 generator.heads=3", "generator.heads=3; use 99 or 102"),
    ("train experiment=gpt generator.widht=8", "did you mean 'generator.width'?"),
    ("train experiment=gpt_t2i", "text_encoder is required: a frozen one of transformers, which nobody trains here, "),
    ("train experiment=gpt text_encoder=a/b", "is for generators by text, but this one takes none; leave it out, or s"),
    ("train text_encoder=a/b", "is for generators by text, but this run trains a tokenizer; leave it out"),
    ("train experiment=gpt generator.text_dim=0", "generator.text_dim=0 must be at least 1"),
    ("train experiment=gpt generator.num_classes=many", "num_classes=many is text, but it needs a whole number"),
    ("train experiment=gpt generator.num_classes=-1", "generator.num_classes=-1 must not be negative"),
    ("train experiment=gpt ema.decay=2", "ema.decay=2 must lie in [0, 1)"),
    ("evaluate", "model_path is required"),
    ("evaluate samples_path={missing}.npz", "does not exist"),
    ("evaluate samples_path={file} reference=trian", "reference=trian is unknown; give train or test"),
    ("evaluate samples_path={file} reference={missing}.npz", "does not exist"),
    ("evaluate samples_path={file} labels=[]", "labels=[] names no class"),
    ("evaluate samples_path={file} samples=0", "samples=0 must be at least 1"),
    ("evaluate samples_path={file} bounds=-1", "bounds=-1 must not be negative"),
    ("evaluate samples_path={file} classifier=tran", "classifier=tran is unknown; did you mean 'train'"),
    ("evaluate model_path={missing}", "does not exist; did you mean 'photos'?"),
    ("evaluate model_path={photos}", "is not an export (no config.json)"),
    # encode: {export} has the files of an export, which no line here gets to read
    ("encode", "model_path is required"),
    ("encode model_path={export}", "output is required"),
    ("encode photo.jpg", "'photo.jpg' is not key=value (without spaces around '='), such as image=photo.jpg"),
    ("encode model_path={export} output=a.tok", "nothing to do: give image=photo.jpg (to tokens), decode=photo.tok"),
    ("encode model_path={export} output=a.tok image={photo} decode={tok}", "exclude each other; give one of them"),
    ("encode model_path={missing} output=a.tok image={photo}", "does not exist; did you mean 'photos'?"),
    ("encode model_path={photos} output=a.tok image={photo}", "is not an export (no config.json)"),
    ("encode model_path={export} output=a.tok image={missing}", "image={missing} does not exist; did you mean"),
    ("encode model_path={export} output=a.tok image={empty}", "image={empty} holds no images; give a file, or a"),
    ("encode model_path={export} output=a.tok image=[]", "image=[] names no file"),
    ("encode model_path={export} output=a.tok image={photo},{photo}", "write them as a list: image=[{photo},{photo}]"),
    ("encode model_path={export} output=a.tok image={photos}", "output=a.tok is one file, but image={photos} may be"),
    ("encode model_path={export} output=out image=[{photo},{photo}]", "would both become out/0.tok; rename one of"),
    ("encode model_path={export} output=a.jpg image={photo}", "output=a.jpg must end in .tok, or be a folder; use a"),
    ("encode model_path={export} output={file}/a.tok image={photo}", "is not one; choose another output"),
    ("encode model_path={export} output=/proc/version/a image={photo}", "is not one; choose another output"),
    ("encode model_path={export} output={texts}/notes.tok image={photo}", "exists and is no .tok file; choose another"),
    ("encode model_path={export} output=a.tok image={photo} quality.psnr=20 quality.ssim=0.8",
     "quality.psnr=20 and quality.ssim=0.8 exclude each other; give one of them"),
    ("encode model_path={export} output=a.tok image={photo} quality.psnr=20 length=3",
     "length=3 and quality.psnr=20 exclude each other; give one of them"),
    ("encode model_path={export} output=a.tok image={photo} length=0", "length=0 must be at least 1"),
    ("encode model_path={export} output=a.tok image={photo} length=2.5", "but it needs a whole number"),
    ("encode model_path={export} output=a.tok image={photo} quality.ssim=80", "must be above 0 and at most 1"),
    ("encode model_path={export} output=a.tok image={photo} quality.psnr=-3", "must be above 0 and at most 100"),
    ("encode model_path={export} output=a.tok image={photo} quality.psnr=good", "but it needs a number"),
    ("encode model_path={export} output=a.tok image={photo} quality=24", "quality is a section; set one of its keys"),
    ("encode model_path={export} output=a.tok image={photo} quality.psrn=24", "did you mean 'quality.psnr'?"),
    ("encode model_path={export} output=a.tok image={photo} picture=a.jpg", "must be a file that ends in .png"),
    ("encode model_path={export} output=a.tok image={photo} batch_size=0", "batch_size=0 must be at least 1"),
    ("encode model_path={export} output=a.tok image={photo} optimizer=adamw", "it has data"),
    ("encode model_path={export} output=a.tok image={photo} data.path={photos}", "image={photo} is for single images"),
    ("encode model_path={export} output=out data.path={photos} length=3", "length=3 is for single images, but data"),
    ("encode model_path={export} output=out data=shapes quality.psnr=20", "quality.psnr=20 is for single images, but"),
    ("encode model_path={export} output=out data.path={missing}", "data.path={missing} does not exist; did you mean"),
    ("encode model_path={export} output=out data.path={empty}", "holds no images and no .tar shards"),
    ("encode model_path={export} output=a.tar data.path={photos}", "output=a.tar must be a folder, in which"),
    ("encode model_path={export} output={file} data.path={photos}", "is not one; choose another output"),
    ("encode model_path={export} output=out data.path={photos} views=nine_crop", "did you mean 'ten_crop'; possible: "),
    ("encode model_path={export} output=out data.path={photos} enlarge=[1.05]", "is for views=ten_crop, not views="),
    ("encode model_path={export} output=out data.path={photos} views=ten_crop enlarge=[0.9]", "must be numbers of at"),
    ("encode model_path={export} output=out data.path={photos} batch_size=0", "batch_size=0 must be at least 1"),
    ("encode model_path={export} output=a.tok image={photo} text_encoder=a/b", "is for the captions of a data set"),
    ("encode model_path={export} output=out data.path={photos} text_length=9", "text_length=9 is of text_encoder, wh"),
    ("encode model_path={export} output=out data.path={photos} text_encoder={empty}", "is no model of transformers"),
    # generate: {export} has the files of an export, which no line here gets to read
    ("generate", "model_path is required"),
    ("generate gpt", "'gpt' is not key=value (without spaces around '='), such as model_path=DIR"),
    ("generate model_path={missing}", "does not exist; did you mean 'photos'?"),
    ("generate model_path={photos}", "is not an export (no config.json)"),
    ("generate model_path={export} tokenizer_path={photos}", "tokenizer_path={photos} is not an export"),
    ("generate model_path={export} labels=[]", "labels=[] names no class; give some, such as [0,1]"),
    ("generate model_path={export} labels=cat", "labels=cat is text, but it needs a whole number or a list"),
    ("generate model_path={export} labels=[cat]", "labels=[cat] must be class numbers, such as [0,1]"),
    ("generate model_path={export} labels=0,1", "labels=0,1 has several values; write them as a list: labels=[0,1]"),
    ("generate model_path={export} prompts=[]", 'has no text; give some, such as \'prompts=["a red circle"]\''),
    ("generate model_path={export} prompts=[7]", "prompts=[7] must be texts; put them in quotes"),
    ("generate model_path={export} prompts=[a] labels=1", "prompts=[a] and labels=1 exclude each other; give one of"),
    ("generate model_path={export} prompts=a prompts_file={file}", "exclude each other; give one of them"),
    ("generate model_path={export} prompts_file={missing}.txt", "does not exist"),
    ("generate model_path={export} text_encoder={file}", "is a file; give the folder, or the id of a repository of H"),
    ("generate model_path={export} num=0", "num=0 must be at least 1"),
    ("generate model_path={export} num=many", "num=many is text, but it needs a whole number"),
    ("generate model_path={export} num=2000", "num=2000 pictures are too many for one, output=samples.png"),
    ("generate model_path={export} length=0", "length=0 must be at least 1"),
    ("generate model_path={export} size=0", "size=0 must be at least 1"),
    ("generate model_path={export} output=a.jpg", "output=a.jpg must end in .png or .npz, or be a folder; use a.png"),
    ("generate model_path={export} output={file}/a.png", "is not one; choose another output"),
    ("generate model_path={export} output={file}/out", "is not one; choose another output"),
    ("generate model_path={export} precision=half", "precision=half is unknown; possible: 32-true, bf16-mixed"),
    ("generate model_path={export} seed=-1", "seed=-1 must not be negative"),
    ("generate model_path={export} optimizer=adamw", "optimizer is not a group of `generate`; it has none"),
    ("generate -m model_path={export} seed=1,2", "only `train` sweeps; run `generate` once for each"),
    ("encode -m model_path={export} output=a.tok image={photo}", "only `train` sweeps; run `encode` once for each"),
    ("encode model_path={export} output=a.png decode={missing}", "decode={missing} does not exist"),
    ("encode model_path={export} output=a.png decode={photos}", "decode={photos} holds no .tok files"),
    ("encode model_path={export} output=a.tok decode={tok}", "output=a.tok must end in .png, or be a folder; use a"),
    ("encode model_path={export} output=a.png decode={photo}", "decode={photo} is not a .tok file: it does not begin"),
    ("encode model_path={export} output=a.png decode={cut}", "decode={cut} is damaged: its checksum does not fit"),
    ("encode model_path={export} output=a.png decode={tok} quality.psnr=20", "quality.psnr needs the original image"),
    ("encode model_path={export} output=a.png decode={tok} picture=b.png", "picture needs the original image"),
    ("export", "output is required"),
    ("export output=out", "nothing to export: give run=RUNDIR, or source=titok checkpoint=FILE"),
    ("export output=out run={missing}", "is not a folder"),
    ("export output=out run={photos}", "is not a run folder (no config.yaml)"),
    ("export output=out run={run} source=titok", "exclude each other"),
    ("export output=out source=titoc checkpoint={file}", "did you mean 'titok'; possible: titok"),
    ("export output=out source=titok", "source=titok needs the published file: checkpoint=FILE"),
    ("export output=out source=titok checkpoint={missing}", "does not exist"),
    ("export output={full} source=titok checkpoint={file}", "is not empty; name a new folder"),
    ("export output=out bridge={missing}", "bridge={missing} does not exist"),
    ("export output=out bridge={export} run={run}", "exclude each other; give either run=, or bridge="),
    ("export output=out bridge={export} source=titok", "exclude each other; give either bridge=, or source="),
    ("export output=out bridge={export} bits=0", "bits=0 must be at least 1"),
    ("export output=out bridge={export} data.path={empty}", "holds no images and no .tar shards"),
    ("export output=out run={run} bits=4", "bits=4 is of bridge=DIR, a continuous tokenizer; leave it out"),
    ("export output=out run={run} data.path={photos}", "data.path={photos} is of bridge=DIR, a continuous tokenizer"),
    # sweeps
    ("train -m experiment=titok", "-m without a key of several values"),
    ("train -m optimizer.lr=1e-4,fast", "optimizer.lr=fast is text"),
    ("train -m experiment=titok,titk", "experiment=titk is unknown; did you mean 'titok'?"),
    ("train -m optimizer.lr=1e-4,3e-4 trainer.devices=2", "a sweep's jobs run in one process each"),
    ("train -m data.workers=0,1", "data.workers cannot be swept"),
    ("train -m output=a,b", "output cannot be swept"),
    ("train -m seed=1,1", "two runs of the sweep are the same run"),
    ("train -m optimizer.lr=interval(1e-4,1e-3)", "an interval has no list of values; add sweep=optuna"),
    ("train -m experiment=titok_s128 stage=1,2", "stages follow each other"),
]  # fmt: skip


def assert_refused(code: int, err: str, said: str) -> None:
    assert code == 2
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err
    assert said in err, err


@pytest.mark.parametrize(("line", "said"), BAD_LINES, ids=[line for line, _ in BAD_LINES])
def test_a_bad_command_line_is_refused_in_one_line(
    line: str, said: str, call: Callable, places: dict[str, Path], never_trains: None
) -> None:
    result = call(*(word.format(**places) if "${" not in word else word for word in line.split()))
    assert_refused(result.code, result.err, said.format(**places) if "{" in said else said)
    assert result.out == "" and result.left == []


@pytest.mark.parametrize(
    "line",
    [
        "train optimizer.lrr=1e-3",
        "train experiment=titk",
        "train tokenizer.encoder.width=64.5",
        "train data.image_size=100",
        "train data.path={missing}",
        "train data.path={empty}",
        "train output={file}/runs",
        "train data.batch_size=-8",
        "evaluate model_path={photos}",
        "encode model_path={export} output=a.png decode={cut}",
        "encode model_path={export} output=a.tok image={missing}",
        "generate model_path={photos}",
        "export output=out run={photos}",
        "train -m optimizer.lr=1e-4,fast",
        "trian",
    ],
)
def test_the_scripts_refuse_as_the_functions_do(line: str, here: Path, places: dict[str, Path]) -> None:
    command, *words = line.format(**places).split()
    script = [str(REPOSITORY / f"{command}.py")]
    if not Path(script[0]).is_file():
        script = ["-m", "smalti.commands", command]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, *script, *words], cwd=here, env=environment, capture_output=True, text=True, timeout=60
    )
    assert_refused(done.returncode, done.stderr, "")
    assert done.stdout == "" and list(here.iterdir()) == []
