"""PTB tokens of a text, and its sentences: as every stage splits them, so that their ROUGE compares."""

import functools
import re

# Punkt learns from the start of the text: one second of work, and the same parameters however long the text is.
PUNKT_SAMPLE_CHARACTERS = 500_000

# A full stop inside the text that ends a sentence: after a word of two letters or more that is no title, before a
# capital. NLTK's tokenizer parts only the full stop at the end of its text from the word.
_TITLES = "Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|Gen|Col|Lt|Rev|Hon|Fig|No|vs|al|etc|Inc|Ltd|Co|Corp"
_NOT_A_TITLE = "".join(rf"(?<!\b{title})" for title in _TITLES.split("|"))
_INNER_FULL_STOP = re.compile(rf"(?<=[^\s.][^\s.]){_NOT_A_TITLE}\.(?=[\"'”’)\]]*\s+[\"'“‘(\[]*[A-Z])")


def ptb_tokenize(text):
    """Penn Treebank tokens of `text` (any number of sentences), joined by single spaces, on one line.

    Quotation marks become `` and '' as in the Treebank; brackets stay as they are (no -LRB-), since ROUGE would
    count such names as words.
    """
    tokens = _word_tokenizer().tokenize(_INNER_FULL_STOP.sub(" .", text))
    # A token may hold white space that NLTK does not know as such: a line separator, for one.
    return " ".join(" ".join(tokens).split())


@functools.cache
def _word_tokenizer():
    from nltk.tokenize import NLTKWordTokenizer  # NLTK takes seconds to import, and most of a stage can do without.

    return NLTKWordTokenizer()


class SentenceSplitter:
    """Punkt (Kiss and Strunk 2006): NLTK's English parameters when installed, else learnt from `texts`.

    Nothing is ever downloaded. The same texts in the same order give the same sentences on every run. So that all
    stages split alike, the texts are the documents of the split that is worked on.

    texts: an iterable of str, read up to PUNKT_SAMPLE_CHARACTERS, and not at all when NLTK's data is installed. None
    where there are no documents: then the abbreviations are _TITLES. `kind` names in words which it was.
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
        """The sentences of `text` as a list of str; only the white space between them is left out."""
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
