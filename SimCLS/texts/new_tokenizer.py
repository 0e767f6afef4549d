"""A tokenizer for texts of one kind, trained on them."""

import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = {
    "t5": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
    "bert": {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
             "mask_token": "[MASK]"},
}  # fmt: skip
TEMPLATES = {"t5": "$A </s>", "bert": "[CLS] $A [SEP]"}


def train_tokenizer(documents, arch, vocab_size):
    """A byte-level BPE tokenizer for lower-cased text, trained on a list of Document.

    ROUGE ignores case, and a small model learns faster if `Return` and `return` are one token.
    """
    special = SPECIAL_TOKENS[arch]
    tokenizer = Tokenizer(models.BPE(unk_token=special["unk_token"]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for document in documents for text in document), trainer)
    used = [token for token in TEMPLATES[arch].split() if token != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=TEMPLATES[arch], special_tokens=[(token, tokenizer.token_to_id(token)) for token in used]
    )
    options = {"clean_up_tokenization_spaces": False, **special}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
