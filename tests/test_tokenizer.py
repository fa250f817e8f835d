"""Tokenizer files, BOS and the chat template."""

from __future__ import annotations

import builtins
import io
import json
from pathlib import Path

import pytest
import sentencepiece

from checkpoints import CHAT_TEMPLATE, write_tiny_tokenizer
from fd_minicpm41.errors import UsageError
from fd_minicpm41.reference.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_tokenizer(tmp_path)
    return tmp_path


def set_tokenizer(folder: Path, **values: object) -> None:
    path = folder / "tokenizer_config.json"
    kept = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in kept.items() if v is not None}))


def test_bos_is_added_once_to_plain_and_chat_prompts(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    assert tokenizer.bos_id == 1
    ids = tokenizer.encode("the cat")
    assert ids[0] == 1 and 1 not in ids[1:]
    chat = tokenizer.encode_chat(HELLO)
    assert chat[0] == 1 and 1 not in chat[1:]
    assert tokenizer.decode(ids) == "the cat"


def test_bos_is_never_doubled(folder: Path) -> None:
    """A template or a user may write it, too."""
    set_tokenizer(folder, chat_template="{{ bos_token }}" + CHAT_TEMPLATE)
    tokenizer = Tokenizer(folder)
    assert tokenizer.encode_chat(HELLO).count(1) == 1
    assert tokenizer.encode("<s>the cat") == tokenizer.encode("the cat")


@pytest.mark.parametrize(
    ("setting", "wanted"), [(True, 1), (False, None), (None, 1)], ids=["on", "off", "absent"]
)
def test_who_decides_on_bos(folder: Path, setting: bool | None, wanted: int | None) -> None:
    """Where the setting is absent, tokenizer.json's own post-processor decides."""
    set_tokenizer(folder, add_bos_token=setting)
    tokenizer = Tokenizer(folder)
    assert tokenizer.bos_id == wanted
    assert (1 in tokenizer.encode("the cat")) == (wanted == 1)


def test_a_tokenizer_without_bos(folder: Path) -> None:
    set_tokenizer(folder, bos_token=None)
    tokenizer = Tokenizer(folder)
    assert tokenizer.bos_id is None
    assert 1 not in tokenizer.encode_chat(HELLO)


def test_special_tokens_may_be_objects(folder: Path) -> None:
    set_tokenizer(folder, bos_token={"content": "<s>", "lstrip": False})
    assert Tokenizer(folder).bos_id == 1


def test_stop_ids_come_from_every_file(folder: Path) -> None:
    im_end = Tokenizer(folder).stop_ids
    assert len(im_end) == 1
    (folder / "config.json").write_text('{"eos_token_id": 2}')
    assert Tokenizer(folder).stop_ids == im_end | {2}
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert Tokenizer(folder).stop_ids == im_end | {7, 8}


def test_thinking_is_the_templates_own_choice_unless_asked(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    header = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.render_chat(HELLO) == header
    assert tokenizer.render_chat(HELLO, enable_thinking=True) == header
    assert tokenizer.render_chat(HELLO, enable_thinking=False) == header + "<think>\n\n</think>\n"


def test_think_markers_are_several_pieces_that_depend_on_what_precedes(folder: Path) -> None:
    """The trait of the released tokenizer that the tiny one is made for."""
    tokenizer = Tokenizer(folder)
    after_line = tokenizer.encode("\n</think>")[1:]
    after_space = tokenizer.encode(" </think>")[1:]
    assert len(after_line) > 2 and len(after_space) > 2
    assert after_line[1:] != after_space[1:]


def test_the_template_may_be_a_file_or_a_list(folder: Path) -> None:
    listed = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "listed"}]
    set_tokenizer(folder, chat_template=listed)
    assert Tokenizer(folder).render_chat(HELLO) == "listed"
    (folder / "chat_template.jinja").write_text("from a file")
    assert Tokenizer(folder).render_chat(HELLO) == "from a file"


def test_a_template_has_what_templates_use(folder: Path) -> None:
    template = (
        "{{ {'a': 'é'} | tojson }}{% for m in messages %}{% break %}{% endfor %}"
        "{{ strftime_now('%Y') | length }}{{ tools is none }}"
    )
    set_tokenizer(folder, chat_template=template)
    assert Tokenizer(folder).render_chat(HELLO) == '{"a": "é"}4True'


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for %}",
    ],
)
def test_a_failing_or_prying_template_is_one_error(folder: Path, template: str) -> None:
    set_tokenizer(folder, chat_template=template)
    with pytest.raises(UsageError, match="the chat template fails"):
        Tokenizer(folder).render_chat(HELLO)


def test_bad_files(folder: Path) -> None:
    set_tokenizer(folder, chat_template=None)
    with pytest.raises(UsageError, match="has no chat template"):
        Tokenizer(folder).render_chat(HELLO)
    set_tokenizer(folder, chat_template=5)
    with pytest.raises(UsageError, match="chat_template is int"):
        Tokenizer(folder)
    set_tokenizer(folder, chat_template="x")
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="chat_template.jinja cannot be read"):
        Tokenizer(folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer.json").write_text('{"cut":')
    with pytest.raises(UsageError, match="tokenizer.json cannot be read"):
        Tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match="neither tokenizer.json nor tokenizer.model"):
        Tokenizer(folder)


@pytest.fixture(scope="module")
def sentencepiece_model() -> bytes:
    held = io.BytesIO()
    sentences = ["the cat sat on the mat", "a quick brown fox", "you and me", "think of it"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=held,
        vocab_size=310,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        bos_id=1,
        eos_id=2,
        unk_id=0,
        minloglevel=2,
    )
    return held.getvalue()


def sentencepiece_folder(folder: Path, model: bytes) -> Path:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(model)
    size = len(sentencepiece.SentencePieceProcessor(model_proto=model))
    added = {
        "1": {"content": "<s>", "special": True},
        str(size): {"content": "<|im_end|>", "special": True},
        str(size + 1): {"content": "<|im_start|>", "special": True},
        str(size + 2): {"content": "<|note|>", "special": False},
    }
    set_tokenizer(folder, added_tokens_decoder=added, add_bos_token=None)
    return folder


def test_sentencepiece_with_added_tokens(folder: Path, sentencepiece_model: bytes) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    size = len(processor)
    tokenizer = Tokenizer(sentencepiece_folder(folder, sentencepiece_model))
    assert tokenizer.bos_id == 1
    assert tokenizer.encode("the cat é") == [1, *processor.EncodeAsIds("the cat é")]
    chat = tokenizer.encode_chat(HELLO)
    assert chat.count(1) == 1 and chat[:2] == [1, size + 1] and size in chat
    assert tokenizer.stop_ids == {size}
    assert tokenizer.decode(tokenizer.encode("the cat é")) == "the cat é"
    assert tokenizer.decode([1, size + 1, *processor.EncodeAsIds("a fox"), size]) == "a fox"
    assert "<|note|>" in tokenizer.decode(tokenizer.encode("the <|note|> cat"))


def test_sentencepiece_missing_or_damaged(
    folder: Path, sentencepiece_model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentencepiece_folder(folder, sentencepiece_model)
    half = sentencepiece_model[: len(sentencepiece_model) // 2]
    (folder / "tokenizer.model").write_bytes(half)
    with pytest.raises(UsageError, match="tokenizer.model cannot be read"):
        Tokenizer(folder)
    real_import = builtins.__import__

    def without_sentencepiece(name: str, *args: object, **kwargs: object) -> object:
        if name == "sentencepiece":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without_sentencepiece)
    with pytest.raises(UsageError, match="pip install sentencepiece"):
        Tokenizer(folder)
