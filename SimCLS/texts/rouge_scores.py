"""The ROUGE of candidate summaries, for all stages."""

import functools
import importlib.metadata

import numpy as np

from harness.endings import UserError

try:
    from rouge_score_rs import tokenizers
    from rouge_score_rs.rouge_scorer import RougeScorer
except ImportError:  # No wheel for this platform; Google's package gives the same scores, but is several times slower.
    from rouge_score.rouge_scorer import RougeScorer

    tokenizers = None

METRICS = ("rouge1", "rouge2", "rougeLsum")
# What ROUGE counts. The standard tokens are stemmed runs of a-z and 0-9; they ignore other scripts.
ROUGE_TOKENS = {
    "standard": None,
    "unicode": "UnicodeTokenizer",  # Words of any script, ideographs one by one.
    "characters": "CharacterTokenizer",  # Letters and digits one by one: for scripts without spaces.
}
# Of the references' letters, the least share that the standard tokens must contain, and below which it is told. English
# texts of science have some Greek letters.
LEAST_SEEN, WELL_SEEN = 0.5, 0.98


def add_rouge_argument(parser):
    parser.add_argument("--rouge_tokens", choices=ROUGE_TOKENS, default="standard", help="what ROUGE counts: standard "
                        "(English stems; ignores scripts other than a-z), unicode (words of any script), or "
                        "characters (for scripts without spaces)")  # fmt: skip


@functools.cache
def _scorer(tokens):
    if ROUGE_TOKENS[tokens] is None:
        return RougeScorer(METRICS, use_stemmer=True)
    if tokenizers is None:
        raise UserError(f"--rouge_tokens {tokens} needs the package rouge-score-rs; install it, or choose standard")
    return RougeScorer(METRICS, tokenizer=getattr(tokenizers, ROUGE_TOKENS[tokens])())


def score(reference, candidates, tokens="standard"):
    """F-measures from 0 to 1 by METRICS, float64 [candidates, 3].

    reference: list of sentences, each a str. candidates: list of such lists. As in `rouge-score`, a newline also ends a
    sentence, and sentences matter only for ROUGE-Lsum. tokens: a key of ROUGE_TOKENS.
    """
    target, scorer = "\n".join(reference), _scorer(tokens)
    scores = [scorer.score(target, "\n".join(candidate)) for candidate in candidates]
    return np.array([[each[name].fmeasure for name in METRICS] for each in scores]).reshape(-1, len(METRICS))


def agreement(candidates, tokens="standard"):
    """The similarity of each candidate to all of them, float64 [candidates]: the mean of its three ROUGE scores, with
    each candidate (itself included) as the reference in turn. 1 minus this is its Bayes risk (Kumar and Byrne 2004).

    candidates: lists of tokenized, lower-cased sentences.
    """
    return np.mean([mean_score(score(reference, candidates, tokens)) for reference in candidates], axis=0)


def signature(tokens, splitter):
    """How the scores were computed, in one line: package and version, tokens, stemmer, sentences and case.

    tokens: a key of ROUGE_TOKENS. splitter: how sentences were split, in words.
    """
    package = type(_scorer(tokens)).__module__.partition(".")[0].replace("_", "-")
    stemmed = "a-z0-9 with Porter stems" if ROUGE_TOKENS[tokens] is None else f"{tokens}, no stems"
    return (
        f"ROUGE-1, -2, -Lsum F1: {package} {importlib.metadata.version(package)}; tokens {stemmed}; sentences by "
        f"{splitter}; lower case, Penn Treebank tokens"
    )


def mean_score(figures):
    """The mean of the three ROUGE scores [..., 3], by which SimCLS ranks candidates."""
    return (figures[..., 0] + figures[..., 1] + figures[..., 2]) / 3


def check_references(references, tokens, where, say=print):
    """UserError if ROUGE would ignore more than half of the letters of `references`, an iterable of str, or if there
    are none; a message if it would ignore some of them completely, or more than a few letters."""
    count = letters = seen = blank = empty = 0
    for reference in references:
        own = [letter for letter in reference if letter.isalpha()]
        ascii_letters = sum(map(str.isascii, own))
        count, letters, seen = count + 1, letters + len(own), seen + ascii_letters
        blank += not any(map(str.isalnum, reference))
        empty += not ascii_letters and not any(letter.isascii() and letter.isdigit() for letter in reference)
    if tokens != "standard":  # Which count letters and digits of all scripts.
        seen, empty = letters, blank
    if count and blank == count:
        raise UserError(f"{where}: no text has a letter or digit, so ROUGE would be 0 for all")
    if count and (empty == count or seen < LEAST_SEEN * letters):
        raise UserError(
            f"{where}: the standard ROUGE tokens are a-z and 0-9, but {letters - seen} of the {letters} letters are "
            "others; add --rouge_tokens unicode (words), or characters (scripts without spaces), in every stage"
        )
    if seen < WELL_SEEN * letters and not empty:
        say(
            f"{where}: the standard ROUGE tokens leave out {letters - seen} of {letters} letters, those beyond a-z; "
            "--rouge_tokens unicode counts them"
        )
    if empty:
        say(f"{where}: {empty} of {count} texts have no letter or digit that ROUGE counts; they score 0")
