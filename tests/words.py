"""A WordPiece tokenizer of few words, for models of the tests."""

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = "the a cat dog man sat ran saw on in red old mat hat box big ##s ##ed ##ing . ,"
VOCABULARY = {word: i for i, word in enumerate([*SPECIAL, *WORDS.split()])}


def save_tokenizer(folder) -> None:
    """Write it as Hugging Face does."""
    made = Tokenizer(models.WordPiece(VOCABULARY, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )  # fmt: skip
    names = {f"{word.strip('[]').lower()}_token": word for word in SPECIAL}
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)
