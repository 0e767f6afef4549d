"""Bad input of every kind, on disk, and the table of what each script must say of it (tests/test_bad_input.py)."""

import gzip
import json
import os
import shutil
import sqlite3
import struct
import zlib

import tiny_inputs
import torch
from PIL import Image

from models.resnext import ResNeXt

RESNEXT = (
    "--dataset folder --data_dir {good}/pictures --model resnext29_1x4d --batch_size 8 --num_worker 0 --num_epoch 1"
)
# Good arguments of each script; those of a case come after them, and so in their place.
GOOD = {
    "resnext/resnext.py": RESNEXT,
    "resnext/resnext_checkpoint.py": RESNEXT,
    "resnext/resnext_fast.py": RESNEXT,
    "resnext/evaluate.py": "",
    "SimCLS/finetune_model.py": "--pt_model {good}/t5 --data_file {good}/papers.csv --save_dir tuned --num_epoch 1 "
    "--max_source_length 24 --max_target_length 8",
    "SimCLS/gen_candidate.py": "--generator_name {good}/t5 --dataset_name {good}/papers.csv --num_cands 4 "
    "--decoder_max_len 8",
    "SimCLS/preprocess.py": "--src_dir {good}/candidates --tgt_dir samples --split train --cand_num 3 --workers 1",
    "SimCLS/main.py": "--dataset {good}/samples --model_type {good}/t5 --num_workers 0 --num_epoch 1 --batch_size 4",
    "SimCLS/brio.py": "--generator_name {good}/t5 --dataset {good}/samples --save_dir brio --num_workers 0",
    "SimCLS/scorer/minilm.py": "",
    "SimCLS/create_model.py": "--data_file {good}/papers.csv --save_dir made --vocab_size 320 --d_model 32",
    "SimCLS/evaluate_model.py": "",
    "SimCLS/summarize.py": "--generator_name {good}/t5 --num_cands 2 --decoder_max_len 4",
    "SimCLS/texts/sample_data.py": "",
    "report.py": "",
}
# script: [(arguments of a case, what the line holds)]. {good} and {bad} are folders; `taken` is a file, and `mine` a
# folder with a file, both in the current folder.
TABLE = {
    "resnext/resnext.py": [
        ("--device gpu", "--device: 'gpu' is none of cpu, cuda, cuda:1 and the like, and mps"),
        ("--device cuda", "--device cuda: PyTorch finds no CUDA GPU on this machine"),
        ("--device mps", "--device mps: PyTorch finds no GPU of Apple's on this machine"),
        ("--threads 0", "--threads: '0' is not a whole number of at least 1"),
        ("--num_worker -1", "--num_worker: '-1' is not a whole number from 0 to "),
        ("--num_epoch 0", "--num_epoch: '0' is not"),
        ("--num_epoch 1.5", "--num_epoch: '1.5' is not"),
        ("--batch_size 0", "--batch_size: '0' is not"),
        ("--lr 0", "--lr: '0' is not a number above 0"),
        ("--lr nan", "--lr: 'nan' is not"),
        ("--lr inf", "--lr: 'inf' is not"),
        ("--lr 1e38", "--lr: '1e38' is not a number above 0 and at most 1e+37"),
        ("--num_worker 1000000", "--num_worker: '1000000' is not a whole number from 0 to "),
        ("--seed -1", "--seed: '-1' is not"),
        ("--seed 100000000000000000000", "is not a whole number from 0 to 2**63 - 1"),
        ("--max_steps 0", "--max_steps: '0' is not"),
        ("--model resnet50", "--model: 'resnet50' is not of the form resnext29_"),
        ("--model resnext29_0x4d", "is not of the form"),
        ("--dataset imagenet", "--dataset: invalid choice"),
        ("--loader gpu", "--loader: invalid choice"),
        ("--half_precision int8", "'int8' is neither float16 nor bfloat16"),
        ("--true_fp32 maybe", "'maybe' is neither True nor False"),
        ("--no_such_flag", "unrecognized arguments: --no_such_flag"),
        ("--output_dir taken", "output folder taken is a file"),
        ("--output_dir taken/below", "output folder taken/below is a file, or lies in one"),
        ("--output_dir /proc/no/such", "cannot make the output folder /proc/no/such"),
        ("--data_dir nowhere", "there is no folder nowhere/train"),
        ("--data_dir {bad}/pictures/no_test", "there is no folder {bad}/pictures/no_test/test"),
        ("--data_dir {bad}/pictures/no_classes", "has no class folders with pictures in them"),
        ("--data_dir {bad}/pictures/other_class", "has the class 'new', which {bad}/pictures/other_class/train lacks"),
        ("--data_dir {bad}/pictures/text", "cannot decode the picture {bad}/pictures/text/train/dark/0.png"),
        ("--data_dir {bad}/pictures/cut", "cannot decode the picture {bad}/pictures/cut/test/light/0.png"),
        ("--data_dir {bad}/pictures/empty", "cannot decode the picture"),
        ("--data_dir {bad}/pictures/bomb", "DecompressionBombError"),
        ("--data_dir {bad}/pictures/no_picture", "no_picture/train/light has no picture in it, but stands for a class"),
        ("--data_dir {bad}/pictures/lost_class", "lost_class/train has the class 'light', which {bad}/pictures"),
        ("--data_dir {bad}/pictures/float", "float/train/dark/0.tif (pixels of mode F in TIFF have no certain white"),
        ("--size 20", "--size: '20' is no multiple of 8"),
        ("--size 0", "--size: '0' is not a whole number of at least 1"),
        ("--dataset digits --size 64", "--size 64 is for --dataset folder"),
        ("--init absent.pt", "cannot read absent.pt"),
        ("--init taken", "taken holds no weights of a ResNeXt-29"),
        (
            "--init {bad}/weights/alone.pt --model resnext29_2x4d",
            "alone.pt holds no weights of this model",
        ),
        ("--data_dir {bad}/pictures/pipe", "pipe/test/dark/0.png (it is no file)"),
    ],
    "resnext/resnext_checkpoint.py": [
        ("--memory_budget 0", "--memory_budget: '0' is not a number above 0 and at most 1"),
        ("--memory_budget 1.1", "--memory_budget: '1.1' is not"),
        ("--memory_budget 0.01", "cannot be met; the least peak that this model can have is"),
        ("--policy all", "--policy: invalid choice"),
        ("--policy block --memory_budget 0.5", "not allowed with argument"),
    ],
    "resnext/resnext_fast.py": [
        ("--label_smoothing 2", "--label_smoothing: '2' is not"),
        ("--ema 0", "--ema: '0' is not"),
        ("--cuda_graphs", "--cuda_graphs launches what --compile makes; add --compile"),
        ("--optimizer lion", "--optimizer: invalid choice"),
    ],
    "resnext/evaluate.py": [
        ("", "the following arguments are required: RUN.pt"),
        ("absent.pt", "cannot read absent.pt: No such file or directory"),
        ("mine", "cannot read mine: Is a directory"),
        ("taken", "taken holds no weights of a ResNeXt-29"),
        ("cache/hostile/scorer.bin", "hostile/scorer.bin holds no weights of a ResNeXt-29"),
        ("cache/good/scorer.bin", "good/scorer.bin holds no weights of a ResNeXt-29"),
        ("{bad}/weights/alone.pt", "alone.json, the record that would tell classes, mean, std, is not there; name the"),
        ("{bad}/weights/alone.pt --dataset digits", "tells 2 classes apart (0, 1, 2, 3, 4, 5, 6, 7, 8, 9), and"),
        ("{bad}/weights/torn.pt", "weights/torn.json is no record of a run"),
        ("{bad}/weights/whole.pt --pictures taken", "cannot decode the picture taken (UnidentifiedImageError)"),
        ("{bad}/weights/whole.pt --data_dir nowhere", "there is no folder nowhere/train"),
        ("{bad}/weights/whole.pt --export model.pb", "--export model.pb: name a file that ends with .pt2"),
        ("{bad}/weights/whole.pt --std 0 1 1", "--std: '0' is not a number above 0"),
    ],
    "SimCLS/finetune_model.py": [
        ("--device cuda:1", "--device cuda:1: PyTorch finds no CUDA GPU on this machine"),
        ("--pt_model no/such-model", "--generator_name 'no/such-model': no sequence-to-sequence model"),
        ("--pt_model {good}/bert", ": no sequence-to-sequence model"),
        ("--pt_model {bad}/models/hostile", ": no sequence-to-sequence model"),
        ("--pt_model {bad}/models/remote", ": no sequence-to-sequence model"),
        ("--data_file {bad}/tables/columns.csv", "has no column 'abstract'; its columns are: 'body', 'headline'"),
        ("--doc_col_name body", "has no column 'body'; its columns are: 'abstract', 'title'"),
        ("--half_precision int8", "int8"),
        ("--label_smoothing 1", "not below 1"),
        ("--dropout 1", "not below 1"),
        ("--save_dir taken", "taken"),
        ("--batch_size 0", "--batch_size: '0' is not"),
        ("--dataset_percent 101", "a dataset percentage of 101.0 is not above 0 and at most 100"),
        ("--seed 4294967296", "--seed: '4294967296' is not a whole number from 0 to 2**32 - 1"),
        ("--max_source_length 1", "--max_source_length 1 leaves no room for a text; this model needs 2 tokens"),
        ("--max_target_length 1", "--max_target_length 1 leaves no room for a text"),
        ("--pt_model {bad}/models/bart --max_source_length 65", "65 is more than the 64 positions of this model"),
        ("--pt_model {bad}/models/bart --max_target_length 65", "65 is more than the 64 positions of this model"),
        ("--pt_model {bad}/models/penalty", "`length_penalty`: `num_beams` is set to None"),
        ("--pt_model {bad}/models/sequences", "do not support `num_return_sequences` different than 1"),
        ("--pt_model {bad}/models/starts", "decoder_start_token_id is [3, 4]; it has to be one token"),
        ("--pt_model {bad}/models/start", "start with token 0 in training and with 5 in generation"),
        ("--data_file {bad}/tables/chinese.csv", "letters are others; add --rouge_tokens unicode (words)"),
        ("--rouge_tokens letters", "--rouge_tokens: invalid choice: 'letters'"),
        ("--data_file {bad}/tables/shifted.csv", "shifted.csv, line 8: 3 fields, where the header has 2"),
    ],
    "SimCLS/brio.py": [
        ("--generator_name {good}/bert", "no sequence-to-sequence model"),
        ("--dataset {bad}/samples/none", "holds no sample"),
        ("--save_dir taken", "output folder taken is a file"),
        ("--lr 0", "--lr: '0' is not"),
        ("--max_target_length 1", "--max_target_length 1 leaves no room for a text"),
    ],
    "SimCLS/scorer/minilm.py": [],
    "SimCLS/gen_candidate.py": [
        ("--device cuda:1", "--device cuda:1: PyTorch finds no CUDA GPU on this machine"),
        ("--generator_name no/such/folder", "'no/such/folder': no sequence-to-sequence model"),
        ("--generator_name mine", "can be loaded in this folder"),
        ("--generator_name {bad}/models/hostile", "can be loaded in this folder"),
        ("--generator_name {bad}/models/remote", "can be loaded in this folder"),
        ("--generator_name {bad}/models/damaged", "can be loaded in this folder"),
        ("--generator_name {bad}/models/no_tokenizer", "can be loaded in this folder"),
        ("--generator_name {bad}/models/bad_config", "can be loaded in this folder"),
        ("--dataset_name nothing.csv", "there is no dataset 'nothing.csv'"),
        ("--dataset_name mine", "there is no dataset 'mine'"),
        ("--dataset_name {bad}/tables/empty.csv", "empty.csv is empty"),
        ("--dataset_name {bad}/tables/blank.csv", "blank.csv is empty"),
        ("--dataset_name {bad}/tables/latin.csv", "latin.csv, line 8: not UTF-8"),
        ("--dataset_name {bad}/tables/few.csv", "few.csv has 9 usable documents"),
        ("--dataset_name {bad}/tables/same.csv", "same.csv has 1 usable documents"),
        ("--dataset_name {bad}/tables/quote.csv", "quote.csv"),
        ("--dataset_name {bad}/tables/shifted.csv", "shifted.csv, line 8: 3 fields, where the header has 2"),
        ("--generator_name {bad}/models/start", "start with token 0 in training and with 5 in generation"),
        ("--generator_name {bad}/models/bart --max_source_length 65", "65 is more than the 64 positions of this model"),
        ("--generator_name {bad}/models/bart --decoder_max_len 65", "65 is more than the 64 positions of this model"),
        ("--dataset_name {bad}/tables/cut.csv.gz", "no complete gzip file"),
        ("--dataset_name {bad}/tables/text.csv.gz", "no complete gzip file"),
        ("--num_groups 3", "--num_groups 3 does not divide --num_cands 4"),
        ("--num_cands 0", "--num_cands: '0' is not"),
        ("--decoder_max_len 1", "--decoder_max_len 1 leaves no room"),
        ("--length_penalty nan", "length penalty of nan"),
        ("--max_source_length 1", "--max_source_length 1 leaves no room for a text; this model needs 2 tokens"),
        ("--dataset_percent 0", "--dataset_percent: '0' is not"),
        ("--output_dir taken", "taken"),
    ],
    "SimCLS/preprocess.py": [
        ("--cand_num 4", "--num_cands 4: train.out has 180 lines, not 240"),
        ("--cand_num 0", "--cand_num: '0' is not"),
        ("--split dev", "--split: invalid choice"),
        ("--split val", "cannot read {good}/candidates/val.source"),
        ("--src_dir {bad}/candidates/more", "train.out.tokenized has 181 lines, not 180"),
        ("--src_dir {bad}/candidates/latin", "train.out, line 7: byte 0xe9 is not UTF-8"),
        ("--src_dir {bad}/candidates/empty", "train.source is empty"),
        ("--src_dir {bad}/candidates/missing", "cannot read {bad}/candidates/missing/train.target.tokenized"),
        ("--tgt_dir taken", "the output folder taken is a file"),
        ("--workers 0", "--workers: '0' is not"),
    ],
    "SimCLS/main.py": [
        ("--device gpu", "--device: 'gpu' is none of cpu, cuda, cuda:1 and the like, and mps"),
        ("--device cuda", "--device cuda: PyTorch finds no CUDA GPU on this machine"),
        ("--device cpu --cuda", "--device cpu and --cuda both say where to train"),
        ("--dataset nowhere", "cannot read the sample folder nowhere/train"),
        ("--dataset {bad}/samples/none", "holds no sample 0.json, 1.json"),
        ("--dataset {bad}/samples/text", "text/train/3.json is not JSON"),
        ("--dataset {bad}/samples/latin", "latin/train/3.json is not JSON"),
        ("--dataset {bad}/samples/list", "list/train/3.json is no JSON object"),
        ("--dataset {bad}/samples/key", "key/train/3.json lacks the key 'abstract_untok'"),
        ("--dataset {bad}/samples/sentences", "3.json has no list of sentences under 'article'"),
        ("--dataset {bad}/samples/score", "3.json has no list of [sentences, score] under 'candidates'"),
        ("--dataset {bad}/samples/count", "3.json has 5 'candidates' but 6 'candidates_untok'"),
        ("--dataset {bad}/samples/no_candidates", "3.json has no candidates"),
        ("--dataset {bad}/samples/tied", "has candidates of different scores, so that there is nothing to learn"),
        ("--dataset {bad}/samples/chinese", "letters are others; add --rouge_tokens unicode (words)"),
        ("--model_type {good}/bert --total_len 65", "--total_len 65 is more than the 64 positions of this model"),
        ("--model_type nowhere", "no encoder can be loaded from 'nowhere'"),
        ("--model_type {bad}/models/hostile", "no encoder can be loaded from"),
        ("--model_type {bad}/models/remote", "no encoder can be loaded from"),
        ("--model_type {bad}/models/damaged", "no encoder can be loaded from"),
        ("--gpuid 0 0", "--gpuid 0 0 names a GPU twice"),
        ("--gpuid -1", "--gpuid: '-1' is not"),
        ("--model_pt ../x.bin", "leaves the folder cache"),
        ("--model_pt run/x.bin", "there are no weights cache/run/x.bin"),
        ("--model_pt other/scorer.bin", "was trained for the encoder {good}/bert"),
        ("--model_pt plain/scorer.bin", "holds no weights of a scorer"),
        ("--model_pt hostile/scorer.bin", "holds no weights of a scorer"),
        ("--model_pt empty/scorer.bin", "holds no weights of a scorer"),
        ("--model_pt torn/scorer.bin", "scorer.json does not describe a scorer"),
        ("-e", "name them by --model_pt"),
        ("--run_name ../x", "'../x' is no plain folder name"),
        ("--lr 0", "a number above 0"),
        ("--dropout 1", "not below 1"),
        ("--warmup 2", "--warmup: '2' is not"),
        ("--half_precision int8", "neither float16 nor bfloat16"),
        ("--total_len 0", "--total_len: '0' is not"),
        ("--total_len 2", "--total_len 2 leaves no room for a text; this model needs 3 tokens"),
        ("--max_len 1", "--max_len 1 leaves no room for a text"),
        ("--seed 100000000000000000000", "is not a whole number from 0 to 2**63 - 1"),
        ("--lr 1e38", "--lr: '1e38' is not"),
    ],
    "SimCLS/create_model.py": [
        ("--num_heads 3", "--d_model 32 is not a multiple of --num_heads 3"),
        ("--dropout 1", "--dropout 1.0 is not below 1"),
        ("--vocab_size 100", "--vocab_size 100 is below 300"),
        ("--seed 4294967296", "--seed: '4294967296' is not a whole number from 0 to 2**32 - 1"),
        ("--arch gpt", "--arch: invalid choice"),
        ("--sum_col_name x", "has no column 'x'"),
        ("--save_dir taken", "the output folder taken is a file"),
    ],
    "SimCLS/summarize.py": [
        ("none.txt", "cannot read none.txt"),
        ("mine", "cannot read mine"),
        ("{bad}/candidates/latin/train.out", "train.out, line 7"),
        ("{bad}/candidates/empty/train.out", "train.out is empty; it needs a document a line"),
        ("none.csv", "cannot read none.csv"),
        ("{bad}/tables/columns.csv", "has no column 'abstract'; its columns are: 'body', 'headline'"),
        ("{bad}/tables/latin.csv", "not UTF-8"),
        ("{bad}/tables/text.csv.gz", "no complete gzip file"),
        ("{good}/papers.csv --scorer_path none.bin", "none.bin is no file; main.py writes"),
        ("{good}/papers.csv --scorer_path cache/plain/scorer.bin --model_type {good}/t5", "no weights of"),
        ("{good}/papers.csv --generator_name none", "'none'"),
        ("{good}/papers.csv --search beams", "--search: invalid choice"),
        ("{good}/papers.csv --top_p 0", "--top_p: '0' is not"),
        ("{good}/papers.csv --decoder_max_len 1", "--decoder_max_len 1 leaves no room"),
    ],
    "SimCLS/evaluate_model.py": [
        (
            "--samples {good}/samples/test --scorer_path cache/good/scorer.bin --device cuda",
            "--device cuda: PyTorch finds no CUDA GPU on this machine",
        ),
        ("", "name one of --generator_name, --samples"),
        ("--samples x", "--samples needs --scorer_path"),
        ("--samples x --summaries y", "name one of"),
        (
            "--summaries mine/one.txt --references mine/one.txt --output taken",
            "taken is there, an evaluation of something",
        ),
        ("--summaries mine/one.txt", "go together"),
        ("--summaries mine/one.txt --references mine/two.txt", "one.txt has 1 lines, mine/two.txt 2"),
        ("--summaries none.txt --references mine/two.txt", "cannot read none.txt"),
        ("--summaries {bad}/candidates/latin/train.out --references mine/two.txt", "train.out, line 7"),
        ("--generator_name x --scorer_path none/scorer.bin", "none/scorer.bin is no file; main.py writes"),
        ("--samples none --scorer_path cache/good/scorer.bin", "cannot read the sample folder none"),
        ("--samples {bad}/samples/key/train --scorer_path cache/good/scorer.bin", "3.json lacks the key"),
        ("--samples {good}/samples/test --scorer_path none.bin --model_type {good}/t5", "none.bin"),
        (
            "--samples {good}/samples/test --scorer_path cache/good/scorer.bin --model_type {good}/bert",
            "was trained for",
        ),
        (
            "--samples {good}/samples/test --scorer_path cache/hostile/scorer.bin --model_type {good}/t5",
            "no weights of",
        ),
        ("--samples {good}/samples/test --scorer_path cache/good/scorer.bin --max_len 2", "--max_len 2 leaves no room"),
        (
            "--samples {good}/samples/test --scorer_path cache/good/scorer.bin --num_cands 4",
            "have 6 candidates a document",
        ),
        ("--samples x --scorer_path y --sources mine/one.txt", "--sources goes with --summaries"),
        ("--generator_name x --scorer_path y --num_cands 4 --num_groups 3", "--num_groups 3 does not divide"),
        ("--generator_name none --scorer_path cache/good/scorer.bin --dataset_name none", "no dataset 'none'"),
        ("--generator_name none --scorer_path cache/good/scorer.bin --dataset_name {good}/papers.csv", "'none'"),
    ],
    "SimCLS/texts/sample_data.py": [
        ("--output mine", "--output mine is a folder"),
        ("--outptu x", "unrecognized arguments"),
    ],
    "report.py": [
        ("absent", "there is no folder absent"),
        ("--nsys absent", "cannot read the trace absent"),
        ("--nsys mine", "cannot read the trace mine"),
        ("--nsys {bad}/traces/text", "text is no SQLite file"),
        ("--nsys {bad}/traces/empty", "empty is no SQLite file"),
        ("--nsys {bad}/traces/cut", "cannot read the trace {bad}/traces/cut"),
        ("--nsys {bad}/traces/other", "other has no NVTX ranges"),
        ("--nsys {bad}/traces/no_steps", "no_steps has no ranges named '... - step N'"),
        ("--phases absent.json", "absent.json"),
        ("--phases {bad}/records/text.json", "text.json"),
        ("--phases {bad}/records/list.json", "list.json"),
        ("--phases {bad}/records/format.json", "format.json"),
        ("--phases {bad}/records/no_epochs.json", "no_epochs.json"),
        ("mine --readme mine/one.txt", "mine/one.txt has no README.md"),
        ("mine --readme mine", "has no partner"),
        ("mine --readme absent", "absent has no README.md"),
        ("mine --nsys x --phases y", "not allowed with argument"),
    ],
}


class Mark:
    """Pickled, it makes a file when it is loaded by a loader that runs code."""

    def __reduce__(self):
        return (open, ("the-pickle-ran", "w"))


def make_bad_files(good, bad):
    make_pictures(good / "pictures", bad / "pictures")
    make_tables(bad / "tables")
    make_models(good, bad / "models")
    make_candidates(good / "candidates", bad / "candidates")
    make_samples(good / "samples", bad / "samples")
    make_traces(bad / "traces")
    make_records(bad / "records")
    make_resnext_weights(bad / "weights")


def make_pictures(good, bad):
    changes = {
        "text": ("train/dark/0.png", b"no picture"),
        "cut": ("test/light/0.png", (good / "test/light/0.png").read_bytes()[:900]),
        "empty": ("train/light/1.png", b""),
        "bomb": ("train/dark/0.png", _huge_png(60_000, 60_000)),
    }
    for name, (path, content) in changes.items():
        shutil.copytree(good, bad / name)
        (bad / name / path).write_bytes(content)
    for name in ("no_picture", "lost_class", "float", "pipe"):
        shutil.copytree(good, bad / name)
    for path in (bad / "no_picture/train/light").iterdir():
        path.rename(path.with_suffix(".txt"))
    shutil.rmtree(bad / "lost_class/test/light")
    Image.new("F", (32, 32)).save(bad / "float/train/dark/0.tif")
    (bad / "pipe/test/dark/0.png").unlink()
    os.mkfifo(bad / "pipe/test/dark/0.png")
    shutil.copytree(good, bad / "other_class")
    shutil.copytree(good / "test/dark", bad / "other_class/test/new")
    shutil.copytree(good / "train", bad / "no_test/train")
    (bad / "no_classes/train").mkdir(parents=True)


def _huge_png(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def make_tables(folder):
    rows = [f"text number {index},summary {index}" for index in range(20)]
    texts = {
        "empty.csv": "",
        "blank.csv": " \n \n",
        "columns.csv": "\n".join(["body,headline", *rows]),
        "few.csv": "\n".join(["abstract,title", *rows[:9]]),
        "same.csv": "\n".join(["abstract,title", *(f"text,summary {index}" for index in range(20))]),
        "quote.csv": "\n".join(["abstract,title", rows[0], 'an "open quote, "that never ends', '"x', *rows]),
        "text.csv.gz": "\n".join(["abstract,title", *rows]),
    }
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "shifted.csv").write_text("\n".join(["abstract,title", *rows[:6], "a, b and c,title", *rows]))
    (folder / "chinese.csv").write_text(
        "\n".join(["abstract,title", *(f"文本 {row},猫坐在垫子上 {row}" for row in range(20))])
    )
    lines = [b"abstract,title", *(row.encode() for row in rows)]
    lines[7] = b"caf\xe9,title"
    (folder / "latin.csv").write_bytes(b"\n".join(lines))
    (folder / "cut.csv.gz").write_bytes(gzip.compress(texts["few.csv"].encode())[:-9])


def make_models(good, folder):
    for name in ("hostile", "remote", "damaged", "no_tokenizer", "bad_config"):
        shutil.copytree(good / "t5", folder / name)
    (folder / "hostile/model.safetensors").unlink()
    torch.save({"shared.weight": Mark()}, folder / "hostile/pytorch_model.bin")
    (folder / "damaged/model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0broken")
    for path in folder.glob("no_tokenizer/tokenizer*"):
        path.unlink()
    configs = {"penalty": {"length_penalty": 2.0}, "sequences": {"num_return_sequences": 4}}
    configs |= {"start": {"decoder_start_token_id": 5}, "starts": {"decoder_start_token_id": [3, 4]}}
    for name, config in configs.items():
        shutil.copytree(good / "t5", folder / name)
        usual = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
        (folder / name / "generation_config.json").write_text(json.dumps(usual | config))
    make_bart(good, folder / "bart")
    (folder / "bad_config/config.json").write_text('{"model_type": "t5",')
    code = "open('the-pickle-ran', 'w')\nfrom transformers import T5Config as Config\n"
    (folder / "remote/evil.py").write_text(code)
    classes = ("AutoConfig", "AutoModelForSeq2SeqLM", "AutoModelForTextEncoding", "AutoModel")
    config = {"model_type": "evil", "auto_map": dict.fromkeys(classes, "evil.Config")}
    (folder / "remote/config.json").write_text(json.dumps(config))


def make_bart(good, folder):
    """A BART of 64 positions with the tokenizer of a RoBERTa, which is made alike."""
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    sizes |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "d_model": 16, "vocab_size": 400}
    BartForConditionalGeneration(BartConfig(max_position_embeddings=64, **sizes)).save_pretrained(folder)
    tiny_inputs.make_tokenizer("roberta").save_pretrained(folder)


def make_candidates(good, folder):
    for name in ("more", "latin", "empty", "missing"):
        shutil.copytree(good, folder / name)
    with open(folder / "more/train.out.tokenized", "a") as file:
        file.write("one more\n")
    lines = (folder / "latin/train.out").read_bytes().split(b"\n")
    lines[6] = b"caf\xe9"
    (folder / "latin/train.out").write_bytes(b"\n".join(lines))
    for path in (folder / "empty").iterdir():
        path.write_bytes(b"")
    (folder / "missing/train.target.tokenized").unlink()


def make_samples(good, folder):
    sample = json.loads((good / "train/3.json").read_text())
    changes = {
        "text": b"no JSON",
        "latin": b'{"article": ["caf\xe9"]}',
        "list": b"[]",
        "key": {name: value for name, value in sample.items() if name != "abstract_untok"},
        "sentences": sample | {"article": "one text"},
        "score": sample | {"candidates": [["one text", 1.0]]},
        "count": sample | {"candidates": sample["candidates"][:5]},
        "tied": sample | {"candidates": [[text, 0.5] for text, _ in sample["candidates"]]},
        "no_candidates": sample | {"candidates": [], "candidates_untok": []},
    }
    for name, content in changes.items():
        (folder / name / "train").mkdir(parents=True)
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name / "train/3.json").write_bytes(content)
        (folder / name / "val").symlink_to(good / "val")
    (folder / "chinese/val").mkdir(parents=True)
    (folder / "chinese/train").symlink_to(good / "train")
    (folder / "chinese/val/3.json").write_text(json.dumps(sample | {"abstract": ["猫坐在垫子上"]}))
    (folder / "none/train").mkdir(parents=True)
    (folder / "none/train/notes.txt").write_text("no sample")


def make_traces(folder):
    folder.mkdir()
    (folder / "text").write_text("no database")
    (folder / "cut").write_bytes(b"SQLite format 3\0" + bytes(range(200)))
    (folder / "empty").write_bytes(b"")
    for name, statement in {
        "other": "CREATE TABLE some (thing INT)",
        "no_steps": "CREATE TABLE NVTX_EVENTS (start INT, end INT, eventType INT, text TEXT, globalTid INT)",
    }.items():
        with sqlite3.connect(folder / name) as database:
            database.execute(statement)


def make_records(folder):
    folder.mkdir()
    record = {"format": 1, "experiment": "resnext", "arguments": {}, "machine": {}, "epochs": []}
    contents = {
        "text": "{",
        "list": "[]",
        "format": json.dumps(record | {"format": 99}),
        "no_epochs": json.dumps(record),
    }
    for name, text in contents.items():
        (folder / f"{name}.json").write_text(text)


def make_resnext_weights(folder):
    """Weights of two classes: without a record, with a torn one, and with one."""
    folder.mkdir()
    data = {"classes": ["dark", "light"], "mean": [0.5] * 3, "std": [0.5] * 3, "size": 32}
    records = {"torn": "{", "whole": json.dumps({"arguments": {"dataset": "folder"}, "data": data})}
    for name in ("alone", "torn", "whole"):
        torch.save(ResNeXt(1, 4, num_classes=2).state_dict(), folder / f"{name}.pt")
        if name in records:
            (folder / f"{name}.json").write_text(records[name])


def make_weights(good, cache):
    """Scorers below the folder `cache`: a copy of `good`/scorer, and bad ones in all ways."""
    for name in ("good", "other", "plain", "hostile", "empty", "torn"):
        shutil.copytree(good / "scorer", cache / name)
    (cache / "other/scorer.json").write_text(json.dumps({"encoder": str(good / "bert"), "architecture": "bert"}))
    torch.save({"weight": torch.zeros(3)}, cache / "plain/scorer.bin")
    torch.save({"encoder.shared.weight": Mark()}, cache / "hostile/scorer.bin")
    (cache / "empty/scorer.bin").write_bytes(b"")
    (cache / "torn/scorer.json").write_text("{")
