"""Penn Treebank tokens and sentences, the same in all stages, so that their ROUGE is comparable."""

import functools
import re

# Punkt learns only from the start of the text, which takes a second.
PUNKT_SAMPLE_CHARACTERS = 500_000

# A full stop that ends a sentence inside the text: after a word of two or more letters that is not a title, and before
# a capital. NLTK's tokenizer splits off only the full stop at the end of its text.
_TITLES = "Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|Gen|Col|Lt|Rev|Hon|Fig|No|vs|al|etc|Inc|Ltd|Co|Corp"
_NOT_A_TITLE = "".join(rf"(?<!\b{title})" for title in _TITLES.split("|"))
_INNER_FULL_STOP = re.compile(rf"(?<=[^\s.][^\s.]){_NOT_A_TITLE}\.(?=[\"'”’)\]]*\s+[\"'“‘(\[]*[A-Z])")


def ptb_tokenize(text):
    """Penn Treebank tokens of `text` (any number of sentences), joined by single spaces, on one line.

    Quotation marks become `` and '' as in the Treebank; brackets stay as they are (no -LRB-), since ROUGE would count
    such names as words.
    """
    tokens = _word_tokenizer().tokenize(_INNER_FULL_STOP.sub(" .", text))
    # A token may contain white space that NLTK does not recognise, such as a line separator.
    return " ".join(" ".join(tokens).split())


@functools.cache
def _word_tokenizer():
    from nltk.tokenize import NLTKWordTokenizer  # Takes seconds, and is not always needed.

    return NLTKWordTokenizer()


class SentenceSplitter:
    """Punkt (Kiss and Strunk 2006) with NLTK's English parameters if installed, else with those learnt from `texts`.

    Nothing is downloaded. The same texts in the same order always give the same sentences. For the same sentences in
    all stages, pass the documents of the current split.

    texts: an iterable of str, read up to PUNKT_SAMPLE_CHARACTERS, and not at all if NLTK's data is installed; None if
    there are no documents: then the abbreviations are _TITLES. kind: which of these it is, in words.
    """

    def __init__(self, texts):
        from nltk.tokenize import punkt

        self.kind = "NLTK's English Punkt"
        try:
            self._punkt = punkt.PunktTokenizer("english")
        except LookupError:
            self.kind = "Punkt with a list of titles" if texts is None else "Punkt as learnt from the documents"
            self._punkt = punkt.PunktSentenceTokenizer(_titles() if texts is None else _learn_punkt(texts))

    def split(self, text):
        """The sentences of `text`, a list of str; only the white space between them is lost."""
        return [sentence for sentence in self._punkt.tokenize(text.strip()) if sentence]


def _titles():
    from nltk.tokenize.punkt import PunktParameters

    parameters = PunktParameters()
    parameters.abbrev_types.update(_TITLES.lower().split("|"))
    return parameters


def _learn_punkt(texts):
    from nltk.tokenize.punkt import PunktTrainer

    trainer = PunktTrainer()
    trainer.train("\n".join(_take_characters(texts, PUNKT_SAMPLE_CHARACTERS)))
    return trainer.get_params()


def _take_characters(texts, limit):
    for text in texts:
        yield text[:limit]
        limit -= len(text)
        if limit <= 0:
            return
