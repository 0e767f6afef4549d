"""Before stage 1, if nothing can be downloaded: make a small model from scratch, with its own tokenizer.

    python3 create_model.py --arch t5 --data_file sample --save_dir models/scratch --copy_init
    python3 create_model.py --arch bert --data_file sample --save_dir models/encoder

The tokenizer is trained on the training split of a CSV file. `t5` makes a generator for finetune_model.py; its encoder,
like `bert`, can be the initial scorer of main.py. The folder has the usual `from_pretrained` form.
"""

import math
import sys
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

import torch
import transformers

from harness import arguments, endings, torchvision_compat  # noqa: F401
from harness.endings import UserError
from harness.files import publish, staging
from pretrained.model_folders import refuse_to_replace
from texts.documents import add_dataset_arguments, find_dataset, read_documents, split_documents
from texts.new_tokenizer import train_tokenizer


def get_args_parser():
    parser = arguments.OneLineParser(description=__doc__)
    parser.add_argument("--arch", choices=("t5", "bert"), default="t5", help="kind of model")
    add_dataset_arguments(parser)
    parser.add_argument("--save_dir", type=Path, required=True, help="folder for the model and its tokenizer")
    size = parser.add_argument_group("size")
    integer = arguments.positive_int
    size.add_argument("--vocab_size", type=integer, default=6000, help="tokens of the vocabulary")
    size.add_argument("--d_model", type=integer, default=256, help="width of the hidden states")
    size.add_argument("--d_ff", type=integer, default=512, help="width of the feed-forward layers")
    size.add_argument("--num_heads", type=integer, default=4, help="attention heads")
    size.add_argument("--num_layers", type=integer, default=3, help="encoder layers")
    size.add_argument("--num_decoder_layers", type=integer, default=2, help="decoder layers of t5")
    size.add_argument("--max_positions", type=integer, default=512, help="longest input of bert, in tokens")
    parser.add_argument("--dropout", type=arguments.share_below_one, default=0.1, help="probability in training")
    parser.add_argument(
        "--copy_init", **arguments.FLAG, help="start t5 with attention that copies from the document (see copy_init)"
    )
    parser.add_argument("--seed", type=arguments.numpy_seed, default=0, help="seed of the weights")
    return parser


def main():
    args = get_args_parser().parse_args()
    if args.d_model % args.num_heads:
        raise UserError(f"--d_model {args.d_model} is not a multiple of --num_heads {args.num_heads}")
    if args.vocab_size < 300:
        raise UserError(
            f"--vocab_size {args.vocab_size} is below 300, the least for 256 bytes, special tokens and merges"
        )
    refuse_to_replace(args.save_dir)
    documents = read_documents(find_dataset(args.dataset_name), args.doc_col_name, args.sum_col_name)
    transformers.set_seed(args.seed)
    tokenizer = train_tokenizer(split_documents(documents)["train"], args.arch, args.vocab_size)
    model = create_t5(args, tokenizer) if args.arch == "t5" else create_bert(args, tokenizer)
    with staging(args.save_dir) as stage:
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        publish(stage, args.save_dir)
    print(f"{args.save_dir}: {args.arch}, {model.num_parameters():,} parameters, {len(tokenizer)} tokens")


def create_t5(args, tokenizer):
    """A T5ForConditionalGeneration with random weights, and with attention that copies if args.copy_init."""
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=args.d_model,
        d_kv=args.d_model // args.num_heads,
        d_ff=args.d_ff,
        num_heads=args.num_heads,
        num_layers=args.num_layers,
        num_decoder_layers=args.num_decoder_layers,
        dropout_rate=args.dropout,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    model = transformers.T5ForConditionalGeneration(config)
    if args.copy_init:
        copy_init(model)
    return model


def create_bert(args, tokenizer):
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.d_model,
        intermediate_size=args.d_ff,
        num_attention_heads=args.num_heads,
        num_hidden_layers=args.num_layers,
        max_position_embeddings=args.max_positions,
        hidden_dropout_prob=args.dropout,
        attention_probs_dropout_prob=args.dropout,
        pad_token_id=tokenizer.pad_token_id,
    )
    return transformers.BertModel(config)


@torch.no_grad()
def copy_init(model):
    """Give an untrained T5 an induction circuit, since copying from the document is what it would learn last.

    Head 0 of the encoder's first layer attends to the previous token, and writes it into a separate subspace (random
    rows `previous`). Head 0 of every cross-attention compares the decoder's token with this subspace, and so finds the
    positions that follow that token in the document. It writes the token found there to the output, where the tied
    output embedding reads it. Training may change all of it. (The circuit: Olsson et al., 2022, In-context Learning and
    Induction Heads.)
    """
    width, size = model.config.d_model, model.config.d_kv
    current, previous, copied = (_orthonormal_rows(width, size) for _ in range(3))
    # All other outputs start small, or they would drown out the circuit.
    for name, weight in model.named_parameters():
        if name.endswith((".o.weight", ".wo.weight")):
            weight *= 0.1
    attention = model.encoder.block[0].layer[0].SelfAttention
    # T5's bucket 1 means "one token to the left". The bias is shared by all layers.
    attention.relative_attention_bias.weight[1, 0] = 6.0
    attention.v.weight[:size] = current
    attention.o.weight[:, :size] = previous.T
    for block in model.decoder.block:
        attention = block.layer[1].EncDecAttention
        # Normalised states have entries of about 1, so a match has a logit of size * scale**2 = 16, and a random pair
        # one sqrt(size) times smaller: enough to find a token among a hundred.
        scale = math.sqrt(16 / size)
        attention.q.weight[:size] = scale * current
        attention.k.weight[:size] = scale * previous
        # The copy contains only size / width of the token, and must outweigh the whole token that the decoder read.
        attention.v.weight[:size] = copied
        attention.o.weight[:, :size] = 2 * width / size * copied.T


def _orthonormal_rows(width, rows):
    """A float32 tensor of shape (rows, width) with random orthonormal rows, rows <= width."""
    return torch.linalg.qr(torch.randn(width, rows))[0].T.contiguous()


if __name__ == "__main__":
    endings.run(main)
