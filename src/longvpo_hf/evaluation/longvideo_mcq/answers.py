"""What a reply means: which option it names, whether it is right, and how sure a share of right replies is.

Pure Python without imports of this package, so that benchmarks, probes and the metric `longvideo_mcq` share it:
`evaluate` copies the file together with the metric's. What counts as choosing an option was decided on 1405 replies in
many styles and languages (tests/evaluation/answers.jsonl), each of them labelled before it was first read.
"""

from __future__ import annotations

import itertools
import math
import re
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

LETTERS = string.ascii_uppercase

# Marks around an answer that are no part of it; others are: "-5", ".5", "C++".
_AROUND = " \"'`*_()[]{}<>“”‘’«»"
_CLOSING = _AROUND + ".,;:!?…。，！？"

#: The tags of reasoning.py, which this file must not import; a test holds the two equal.
_REASONING = re.compile(
    r"(?P<close></(?:think|thinking|thought|analysis|reasoning|seed:think)>|\[/THINK\]|◁/think▷|<\|END_THINKING\|>"
    r"|<channel\|>|<\|channel\|>final[^<]{0,20}(?:<\|constrain\|>\w*)?<\|message\|>)"
    r"|<(?:think|thinking|thought|analysis|reasoning|seed:think)>|\[THINK\]|◁think▷|<\|START_THINKING\|>"
    r"|<\|channel>thought|<\|channel\|>(?:analysis|commentary)[^<]{0,20}<\|message\|>",
    re.IGNORECASE,
)

# ------------------------------------------------------------------------------------------------- forms of an answer

#: What is the answer whatever is around it; one of the groups holds it.
_BOX = re.compile(
    r"\\f?box(?:ed)?\{((?:[^{}]|\{[^{}]*\})*)\}|<(?:final_?)?(?:answer|choice|option)>"
    r"((?:(?!<(?:final_?)?(?:answer|choice|option)>).)*?)</(?:final_?)?(?:answer|choice|option)>"
    r"|<\|begin_of_box\|>((?:(?!<\|begin_of_box\|>).)*?)<\|end_of_box\|>"
    r"|[\"']answer[\"']\s*:\s*[\"']([^\"']*)[\"']",
    re.IGNORECASE | re.DOTALL,
)
#: What was struck out, and a question that is quoted.
_STRUCK = re.compile(r"~~[^~\n]*~~|[\"“][^\"“”\n]*\?[\"”]")
_ELEMENT = re.compile(r"<([a-z]+\d?)>([^<>]*)</\1>")
_MARKS = re.compile(
    r"<\|[^|>]*\|>|</?s>|[*`#$\"“”«»「」『』【】{}\ufe0f]|\\(?:text|math)[a-z]*(?=\s*\{)|(?<![^\W_])_+|_+(?![^\W_])"
)
#: Letters in black circles and squares, which NFKC leaves alone.
_BLACK = {start + place: letter for start in (0x1F150, 0x1F170) for place, letter in enumerate(LETTERS)}
#: Cyrillic and Greek capitals that look like A to E; alone, and not the words "А", "В" and "С" of a Russian sentence.
_LOOK_ALIKES = dict(zip("АВСЕΑΒΕ", "ABCEABE", strict=True))
_LOOK_ALIKE = re.compile(
    r"(?<![^\W\d_])[АВСЕΑΒΕ](?![^\W\d_])(?!\s+[а-яё])|(?<=[Вв]ариант )[АВСЕ]\b|(?<=[Оо]твет )[АВСЕ]\b"
)
_QUOTED = re.compile(r"['‘]([A-Za-z])['’]")
#: A letter by itself: not of a word, an elision ("C'est"), a compound ("T-shirt") or an initialism ("A.I.").
_LATIN = "A-Za-z0-9À-ɏḀ-ỿ"
_LETTER = re.compile(rf"(?<![{_LATIN}'’])(?<![A-Za-z]-)[A-Za-z](?![{_LATIN}'’]|-[A-Za-z]|\.[A-Za-z]\.)")
_CLOSED = re.compile(r"\s*[)\]>]")
#: Letters that are words in some language: "a", "I", the "e", "o" and "y" of Romance ones.
_WORDS = "AEIOUY"
#: What follows such a letter where it is an option: "A is …", "A because …"; but "A dog", "I think".
_AFTER_OPTION = re.compile(
    r"\s+(?:because|as|since|for|which|in|not|but|due|given|based|is|was|or|and|best|matches|fits|seems|remains"
    r"|answers|describes)\b|\s+(?:rather than|instead of|over)\s+[(\[]?[A-Z]\b"
)
_LOWER_OPTION = re.compile(
    r"\s*(?:[).:\]]|$)|\s+(?:is|was)\s+(?:the\s+)?(?:right|correct|best|answer)\b", re.IGNORECASE
)
_NEXT_WORD = re.compile(r"\s+[A-Za-zÀ-ɏ]")
#: Between two letters that are named together.
_JOINT = re.compile(
    r"[)\]]\s*[(\[]|[)\]]?\s*(?:[/&|、~→]|->|(?:,\s*)?(?:(?:or|and|oder|und|y|et|ou)\b|和|或者?|与|與|及|와|과))\s*"
    r"(?:(?:maybe|perhaps|possibly)\s*)?[(\[]?",
    re.IGNORECASE,
)
_COMMA = re.compile(r"[)\]]?\s*,\s*[(\[]?")
#: After the second of two letters with a comma between: they are not named together ("not on A, B opens the door").
_OF_ITS_OWN = re.compile(r"\s+[A-Za-zÀ-ɏ]|(?![都均皆和与與及])[\u4e00-\u9fff]")
#: Where a reply goes on with a question that nobody asked.
_RAN_ON = re.compile(r"\n[ \t]*(?:question|q|user|human)[ \t]*:", re.IGNORECASE)

#: Words and numbers, and what between two of them ends a line or a sentence.
_RUN = re.compile(r"[^\W_]+")
_BREAK = re.compile(r"\n|[.!?]\s")

#: Words for "answer", in the languages that models answer in, and what names a choice as the right one.
_ANSWER = re.compile(
    r"\banswer\b|\bans\b\.?|\b(?:correct|best|right|selected|final|my|true|accurate|suitable|appropriate)\s+(?:option"
    r"|choice|letter|statement|description|selection|alternative)\b|\boption that\b"
    r"|答案|[选選][项項](?=是|应|應)|正[确確]的?[选選][项項]|정답|답(?=[은는:\s])|答え|正解|解答|回答"
    r"|\brespuesta\b|\bréponse\b|\bantwort\b|\blösung\b|\brichtig ist\b|\bresposta\b|\brisposta\b|\bantwoord\b"
    r"|\bodpowiedź\b|\bodpověď\b|\bsvar\b|\brăspunsul\b|\bválasz\b|\bcevap\b|\bjawaban(?:nya)?\b|\bđáp án\b"
    r"|\b(?:opción|opção|opzione|option|alternativa) corr\w+|\bответ\b|\bαπάντηση\b|उत्तर|উত্তর|คำตอบ|ตอบ|الإجابة"
    r"|الجواب"
    r"|התשובה|(?:верн|правильн)\w+ (?:вариант|выбор)|відповідь|\bsagot\b|\bjibu\b|\bvastaus\b|\bvastus\b|\bodgovor\b"
    r"|\bjawapan\b",
    re.IGNORECASE,
)
_MOST_BETWEEN_CHARACTERS = 45
_LEAD_IN = re.compile(r"^(?:\s+(?:is|are))?[\s:：.\-–—=>()]*")
#: What leads away from the answer: a denial, a clause that gives a reason, the end of the sentence.
_ELSEWHERE = re.compile(
    r"[.!?。\n]|n['’]t\b|\b(?:not|cannot|never|neither|nor|as|because|since|no es|pas|nicht|non|não|не)\b"
    r"|不|没|沒|아니",
    re.IGNORECASE,
)
#: What denies the letter before it.
_DENIED = re.compile(
    r"[)\]]?\s*(?:(?:is|are|was|were|can|does|do|did|seems|ist|est|es)\b\s*)?(?:n['’]t\b|(?:not|never|no|incorrect"
    r"|wrong|less"
    r"|false|falsch|faux|out|excluded|absent|contradicted|cannot|can be|by)\b|(?:[选選][项項])?(?:都|是)?[错錯不]"
    r"|가 아니|ではな)",
    re.IGNORECASE,
)
#: At the start of a reply: what makes a letter an option there ("B. A man", "(B) A man", "B - a man", "B The man").
_OPTION_MARK = re.compile(
    r"\s*[)\]>:;、。]|\.(?!\.)|,|/\s|\s+[-–—]\s|\s*\n|\s+\(\w{2}"
    r"|\s+(?:because|since|rather than|instead of|over|and not|but not)\b"
)
_OPTION_TEXT = re.compile(r"\s+(?:[A-Z0-9]|[^\x00-\u024f])")
_ARTICLE = re.compile(r"\s+(?:The|An|This|He|She|It)\b")
#: After a letter that is called right, in the languages where the verdict comes last.
_CALLED_RIGHT = re.compile(
    r"[)\]]?\s*(?:=\s*)?(?:(?:(?:is|seems|looks|would be|must be|ist|est|es)\s+)?(?:the\s+|la\s+)?(?:stimmt|passt"
    r"|more|most|only|best|better"
    r"|closest|correct\w*|right|richtig|true|answer|one|fits|matches|remains|answers|describes)\b|is what\b|is\s*[.!]?$"
    r"|[选選]?[项項]?是?(?:正[确確]|更|最|[对對]的)|번|(?:[이가]\s*)?(?:정답|맞|옳)|입니다|라고|[를을]\s*(?:선택|고[르를])"
    r"|(?:to be|as)\s+(?:the\s+)?(?:most\s+)?(?:right|correct|best|answer|accurate|likely|plausible)\b"
    r"|(?:rather than|instead of)\b|(?:,\s*)?I(?:['’]d)?\s+(?:guess|think|believe|suppose|say)\b|with\s+\d+\s?%"
    r"|[がは]?(?:正し|正解|最も)|です|だと|を選|(?<=\s)चुन)"
)
#: Before a letter that is chosen, without a word for "answer".
_CHOSEN = re.compile(
    r"(?:\b(?:option|choice|alternativ[ae]|variante?|(?:^|choose |pick |select |is )(?:the )?letter|choose|select"
    r"|pick|guess|think|with(?! the letter)|is|are|was|be|['’]s|so|thus|hence|therefore|but|no"
    r"|actually|maybe|perhaps|probably|likely|obviously|only|leaving|say|definitely|certainly|clearly|(?:go|opt"
    r"|vote) for|corresponds? to|leaves"
    r"|(?:looks?|sounds?|seems) like|pick(?:ing)?|choosing|selecting|supports?|favou?rs?|points? to|indicates|suggests"
    r"|not\s+[(\[]?[a-z][)\]]?(?=\s*[,;:–—-])"
    r"|(?:described|stated|given|listed) (?:in|by|as)|in my (?:opinion|view)|opción|opção|opzione|letra"
    r"|вариант|seçenek"
    r"|es(?: la)?|est(?: la)?|ist|sia|é(?: a)?|è(?: la)?|er|är|là|jest|adalah|este|^(?:la|el|le|il|die)"
    r"|(?<!потому )что|думаю|выбираю|это|по-моему|würde|meiner Meinung nach|à mon avis|selon moi|direi|secondo me"
    r"|elijo|choisi\w+|wähle|wybieram|kies|velger|vælger|väljer|lean(?:ing)?(?: towards?)?|answered|escolho|scelgo"
    r"|memilih|chọn|sino|mais|sondern|ma|а)\b"
    r"|всего,|[→⇒:]|->|=>|[應应](?:為|为|該是|该是)|^\d+[.)]|(?<!不)[选選](?:[择擇项項])?|(?<!不)是|옵션|선택지|선택|選択肢|أختار|الخيار"
    r"|विकल्प)[\s:,(\[-]*"
    r"(?:(?:it['’]?s|it is|the|option|choice|letter)[\s:(\[]+)*$",
    re.IGNORECASE,
)
#: A letter after a change of mind.
_CORRECTED = re.compile(
    r"\b(?:(?:on|after|upon) (?:the |a )?(?:replay|reflection|re-?watching|(?:closer|second) (?:look|viewing))|wait"
    r"|scratch that|on second thoughts?|correction|I mean|actually|sorry)\b[\s,:;.—–-]*(?:no\b[\s,:;.—–-]*)?"
    r"(?:(?:it['’]?s|it is|that['’]?s|(?:the answer|it) (?:is|should be|must be))\s+)?[(\[]?$",
    re.IGNORECASE,
)
#: Verdicts on options, one after the other: "A - wrong; B - correct", "A ❌ B ✅".
_VERDICT = re.compile(
    r"(?P<right>[✓✔✅☑]|\b(?:yes|true|correct|right|richtig|oui|sí|верно|(?<!not )(?:shown|seen|visible|happens"
    r"|appears))\b|正[确確]|(?<!不)[对對])"
    r"|(?P<wrong>[✗✘❌✖☒×]|\b(?:no|not|false|incorrect|wrong|falsch|faux|неверно)\b|[错錯]|不[对對])",
    re.IGNORECASE,
)
_DENIED_BEFORE = re.compile(
    r"\b(?:neither|nor|not|(?:any|every|all|each)\b[^.!?\n]{0,30}\b(?:but|except(?: for)?|besides))\s*[(\[]?$",
    re.IGNORECASE,
)
#: An option that is named by its place.
_ORDINAL = re.compile(
    r"\b(?P<word>first|second|third|fourth|fifth|last)\s+(?:option|choice|alternative|answer)\b"
    r"|\b(?:option|choice|alternative)\s+(?:number\s+|no\.?\s*|#\s*)?(?P<number>[1-9]|I{1,3}|IV|V)\b"
    r"|第(?P<han>[一二三四五])[个個]?(?:[选選][项項]|答案)",
    re.IGNORECASE,
)
_PLACES = {
    **{word: place for place, word in enumerate(("first", "second", "third", "fourth", "fifth"))},
    **{word: place for place, word in enumerate(("i", "ii", "iii", "iv", "v"))},
    **{word: place for place, word in enumerate("一二三四五")},
    **{str(place + 1): place for place in range(9)},
    "last": -1,
}
#: Of a reply that is longer, the start and the end are read: no answer is in the middle of a book.
_MOST_CHARACTERS = 8000


@dataclass(frozen=True, slots=True)
class _Mention:
    """A letter that stands by itself in a text and is no word."""

    letter: str
    start: int
    end: int
    in_brackets: bool


def letter_of(reply: str, letters: Sequence[str]) -> str:
    """The option that a reply chooses, one of `letters`, or "" where it chooses none, or several.

    Reasoning between tags is left out; a reply that ends inside it holds no answer. Of the forms of an answer the first
    that is there decides, and of several of one form the last: a box or an answer tag; a letter alone, as the reply or
    as its last line; the only one that is right in a list of verdicts; after a change of mind ("wait, B"); after a word
    for "answer"; at the start, as options are written ("B. A man", "(B) A man"); called right ("B is correct"); after a
    word of choice ("option B", "so B"); the only one in brackets, or named by its place ("the second option");
    the one that ends the text where all others are denied. Letters
    that are denied ("not A", "A is wrong") and words ("A dog", "I think") do not count. Full-width letters, those in
    circles, and Cyrillic and Greek ones that look alike are Latin ones.
    """
    text = without_reasoning(reply)
    if boxes := _BOX.findall(text[-_MOST_CHARACTERS:]):
        text = next(filter(None, boxes[-1]), "")
    if len(text) > _MOST_CHARACTERS:
        text = text[: _MOST_CHARACTERS // 2] + "\n" + text[-_MOST_CHARACTERS // 2 :]
    text = _STRUCK.sub("", unicodedata.normalize("NFKC", text).translate(_BLACK))
    text = _MARKS.sub("", _QUOTED.sub(r"\1", _ELEMENT.sub(r"\2", text))).strip()
    text = _LOOK_ALIKE.sub(lambda match: _LOOK_ALIKES[match[0]], _to_its_end(text))
    if alone := _alone(text):
        return alone.upper() if alone.upper() in letters else ""
    mentions = _mentions(text)
    for form in (_by_verdicts, _corrected, _after_answer, _at_start, _called_right, _chosen, _left_over):
        mention = form(text, mentions, letters)
        if mention is not None:
            return mention.letter if mention.letter in letters and not _is_joined(text, mention, mentions) else ""
    bracketed = {mention.letter for mention in mentions if mention.in_brackets}
    if not bracketed:
        bracketed = {letters[place] for place in _places(text) if -1 <= place < len(letters)}
    return bracketed.pop() if len(bracketed) == 1 and bracketed <= {*letters} else ""


def is_cut_off(reply: str) -> bool:
    """Whether a reply ends inside its reasoning: it holds no answer, whatever letters are in it."""
    return _split(reply)[1]


def without_reasoning(reply: str) -> str:
    """The answer in a reply: what is outside of its reasoning; "" where the reply ends inside it."""
    return _split(reply)[0]


def is_right(reply: str, answer: str, letters: Sequence[str] = ()) -> bool:
    """Whether a reply is the answer.

    Args:
        reply: What the model said.
        answer: The truth: one of `letters`, or a text.
        letters: The letters of the options. Without any the reply must be the answer's text, but for capitals, blanks
            and marks around it.
    """
    if letters:
        return letter_of(reply, letters) == answer
    said = _plain(without_reasoning(reply))
    return bool(said) and said == _plain(answer)


def wilson_interval(right: int, number: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a share of right answers, in [0, 1].

    Raises:
        ValueError: If not 0 ≤ `right` ≤ `number`, or `number` is 0.
    """
    if not 0 <= right <= number or number < 1:
        raise ValueError(f"An interval needs 0 ≤ right ≤ number and number ≥ 1, got {right} of {number}.")
    z, p = 1.959964, right / number
    centre = (p + z * z / (2 * number)) / (1 + z * z / number)
    half = z * math.sqrt(p * (1 - p) / number + z * z / (4 * number * number)) / (1 + z * z / number)
    return max(0.0, centre - half), min(1.0, centre + half)


def _split(reply: str) -> tuple[str, bool]:
    """The answer in a reply, and whether the reply ends inside its reasoning."""
    parts: list[str] = []
    end, is_inside = 0, False
    for tag in _REASONING.finditer(reply):
        if tag["close"]:
            if not is_inside:  # the template had opened it in the prompt
                parts.clear()
            end, is_inside = tag.end(), False
        elif not is_inside:
            parts.append(reply[end : tag.start()])
            is_inside = True
    return ("", True) if is_inside else ("".join([*parts, reply[end:]]).strip(), False)


def _to_its_end(text: str) -> str:
    """The text up to where it goes on with another question."""
    ends = (match.start() for match in _RAN_ON.finditer(text) if _RUN.search(text, 0, match.start()))
    return text[: next(ends, None)]


def _alone(text: str) -> str:
    """The letter that is the whole text, its last line or its last sentence; "" where none is, or two follow."""
    runs = list(_RUN.finditer(text))
    if len(runs) > 1 and len({run[0] for run in runs}) == 1 and len(runs[0][0]) == 1:  # "B, B"
        runs = runs[:1]
    alone = []
    for run, before in zip(runs[:-3:-1], [*runs[-2::-1], None], strict=False):
        is_letter = run.end() - run.start() == 1 and not run[0].isdecimal()
        if not is_letter or (before and not _BREAK.search(text, before.end(), run.start())):
            break
        alone.append(run[0])
    return alone[0] if len(alone) == 1 else ""


def _mentions(text: str) -> list[_Mention]:
    """The letters of a text that stand by themselves and are no words."""
    mentions = []
    for match in _LETTER.finditer(text):
        letter, start, end = match[0].upper(), match.start(), match.end()
        in_brackets = bool(text[:start].rstrip().endswith(("(", "[", "<")) and _CLOSED.match(text, end))
        is_word = letter in _WORDS and _NEXT_WORD.match(text, end) and not _AFTER_OPTION.match(text, end)
        if match[0].islower() and letter in _WORDS:  # "option a." but "a, b", "e, poi"
            is_word = not _LOWER_OPTION.match(text, end)
        if in_brackets or not is_word or (start == 0 and _ARTICLE.match(text, end)):
            mentions.append(_Mention(letter, start, end, in_brackets))
    return mentions


def _by_verdicts(text: str, mentions: Sequence[_Mention], letters: Sequence[str]) -> _Mention | None:
    """The only one that is right where others are said to be wrong, each by the last word before the next letter."""
    right: list[_Mention] = []
    num_wrong = 0
    for mention, after in itertools.zip_longest(mentions, mentions[1:]):
        verdicts = list(_VERDICT.finditer(text, mention.end, after.start if after else len(text)))
        if verdicts and verdicts[-1]["right"]:
            right.append(mention)
        num_wrong += bool(verdicts and verdicts[-1]["wrong"])
    is_list = len({mention.letter for mention in mentions}) == len(mentions) == len(right) + num_wrong > 2
    return right[0] if is_list and len(right) == 1 else None


def _corrected(text: str, mentions: Sequence[_Mention], letters: Sequence[str]) -> _Mention | None:
    """The last one that takes back another: "A. Wait, no, B."."""
    corrected = [
        mention
        for mention in mentions[1:]
        if _CORRECTED.search(text[max(0, mention.start - 40) : mention.start]) and not _DENIED.match(text, mention.end)
    ]
    return corrected[-1] if corrected else None


def _places(text: str) -> set[int]:
    """The places of options that are named by these: 1 for "the second option", -1 for the last."""
    found = [match["word"] or match["number"] or match["han"] for match in _ORDINAL.finditer(text)]
    return {_PLACES[name.lower()] for name in found}


def _after_answer(text: str, mentions: Sequence[_Mention], letters: Sequence[str]) -> _Mention | None:
    """After the last word for "answer" that a letter follows in its sentence."""
    found = None
    for word in _ANSWER.finditer(text):
        mention = next((mention for mention in mentions if mention.start >= word.end()), None)
        if mention is None:
            break
        between = text[word.end() : mention.start]
        spoken = _LEAD_IN.sub("", between)
        if len(spoken) > _MOST_BETWEEN_CHARACTERS or _ELSEWHERE.search(spoken):
            continue
        if not _DENIED.match(text, mention.end):
            found = mention
    return found


def _at_start(text: str, mentions: Sequence[_Mention], letters: Sequence[str]) -> _Mention | None:
    """At the start of the text, as options are written; not where it goes through all of them."""
    if not mentions or re.search(r"[^\W_]", text[: mentions[0].start]):
        return None
    first = mentions[0]
    is_marked = first.in_brackets or _OPTION_MARK.match(text, first.end) or _ARTICLE.match(text, first.end)
    if not is_marked and (first.letter in _WORDS or not _OPTION_TEXT.match(text, first.end)):
        return None
    marked = [
        each.letter
        for each in mentions
        if each.in_brackets or _OPTION_MARK.match(text, each.end) or each.end == len(text)
    ]
    goes_through_all = first.letter == letters[0] and marked[: min(3, len(letters))] == [
        *letters[: min(3, len(letters))]
    ]
    if goes_through_all or _DENIED.match(text, first.end) or _is_joined(text, first, mentions):
        return None
    return first


def _called_right(text: str, mentions: Sequence[_Mention], letters: Sequence[str]) -> _Mention | None:
    """The last one that is called right."""
    right = [
        mention for mention in mentions if _CALLED_RIGHT.match(text, mention.end) and not _denied_before(text, mention)
    ]
    return right[-1] if right else None


def _chosen(text: str, mentions: Sequence[_Mention], letters: Sequence[str]) -> _Mention | None:
    """The last one after a word of choice."""
    chosen = [
        mention
        for mention in mentions
        if _CHOSEN.search(text[max(0, mention.start - 40) : mention.start])
        and not _DENIED.match(text, mention.end)
        and not _denied_before(text, mention)
    ]
    return chosen[-1] if chosen else None


def _left_over(text: str, mentions: Sequence[_Mention], letters: Sequence[str]) -> _Mention | None:
    """The one that ends the text, where all others are denied: "since A never happens, C"."""
    if len(mentions) < 2 or _RUN.search(text, mentions[-1].end):
        return None
    *others, last = mentions
    denied = all(_DENIED.match(text, other.end) or _denied_before(text, other) for other in others)
    return last if denied and not _denied_before(text, last) else None


def _denied_before(text: str, mention: _Mention) -> bool:
    return bool(_DENIED_BEFORE.search(text[max(0, mention.start - 48) : mention.start]))


def _is_joined(text: str, mention: _Mention, mentions: Sequence[_Mention]) -> bool:
    """Whether a letter is named together with another: "A or B", "A, B"."""
    place = mentions.index(mention)
    for first, second in itertools.pairwise(mentions[max(0, place - 1) : place + 2]):
        if _denied_before(text, first):  # "not A, B"
            continue
        between = text[first.end : second.start]
        if _JOINT.fullmatch(between):
            return True
        if _COMMA.fullmatch(between) and (not _OF_ITS_OWN.match(text, second.end) or _JOINT.match(text, second.end)):
            return True
    return False


def _plain(text: str) -> str:
    text = " ".join(text.casefold().split())
    return text.lstrip(_AROUND).rstrip(_CLOSING) or text
