"""Answers, choices and scores, counted by hand; and where lmms-eval's own tasks score the same answers otherwise.

What the authors of a benchmark do is told from their scripts: `eval_your_results.py` of Video-MME, `check_ans` of
MVBench and MLVU; LongVideoBench's stands in lmms-eval, whose task says so.
"""

from __future__ import annotations

import importlib
import json
import random
import shutil
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist, correlation, stdev
from typing import Any

import pytest
import yaml

import benchmark_doubles as doubles
from longvpo_hf.errors import ConfigError
from longvpo_hf.evaluation import scoring
from longvpo_hf.evaluation.differences import Unit, difference
from longvpo_hf.evaluation.longvideo_mcq.answers import without_reasoning
from longvpo_hf.evaluation.scoring import Record, headline, official, summary
from longvpo_hf.evaluation.subtitles import Subtitle, read_srt, shown_at
from longvpo_hf.evaluation.suite import Question, _rows, letters_of
from longvpo_hf.evaluation.suites import suites

#: What a model wrote, and what it chose among A, B, C and D, as a person reads it; more of them in test_answers.py.
CANNED = [
    ("C", "C"),
    ("Answer: C", "C"),
    ("<think>A or B? I say B.</think>\nC", "C"),
    ("<think>It must be C", ""),  # never came to an answer
    ("", ""),
    ("Cannot be determined from the video.", ""),
    ("a dog", ""),
    ("A or C", ""),
    ("The answer is (B) because the Cat sleeps", "B"),
    ("The answer is A", "A"),
]


def record(name: str, text: str, letters: str, answer: str, group: str = "", options: Sequence[str] = ()) -> Record:
    """What becomes of a reply to a question of a suite."""
    return scoring.record(
        suites()[name], text, Question("?", letters, answer, ("v.mp4",), group, options=tuple(options))
    )


def official_score(name: str, reply: str, letters: str, answer: str, options: Sequence[str] = ()) -> float | None:
    """What a suite's own rule gives a reply."""
    return suites()[name].official(reply, Question("?", letters, answer, ("v.mp4",), options=tuple(options)))


def test_every_question_counts() -> None:
    # 3 of the 10 answers choose C, 5 choose nothing: one of them because it never came to an answer.
    records = [record("lvbench", text, "ABCD", "C") for text, _ in CANNED]
    assert [each["choice"] for each in records] == [choice for _, choice in CANNED]
    assert summary(suites()["lvbench"], records) == {
        "overall": pytest.approx(30.0),
        # lmms-eval reads "Cannot" and "Cat" as C; what never came to an answer is right by no rule.
        "official": pytest.approx(50.0),
        "n": 10,
        "unparsed": pytest.approx(40.0),
        "cut_off": pytest.approx(10.0),
        "groups": {},
    }


def answered(*groups: tuple[str, str]) -> list[Record]:
    """Answers to questions of which C is right, with their group."""
    return [record("videomme", text, "ABCD", "C", group) for text, group in groups]


def test_groups_stand_in_their_order_and_only_those_that_were_asked() -> None:
    records = answered(("A", "long"), ("C", "short"), ("C", "short"), ("B", "short"), ("", "long"))
    assert summary(suites()["videomme"], records) == {
        "overall": pytest.approx(40.0),
        "official": pytest.approx(40.0),
        "n": 5,
        "unparsed": pytest.approx(20.0),
        "cut_off": 0.0,
        "groups": {"short": {"score": pytest.approx(200 / 3), "n": 3}, "long": {"score": 0.0, "n": 2}},
    }


def test_m_avg_is_the_mean_of_tasks_of_any_size() -> None:
    records = answered(("C", "ego"), ("C", "count"), ("A", "count"), ("A", "count"), ("A", "count"))
    scores = summary(suites()["mlvu"], records)
    assert scores["overall"] == pytest.approx(100 * 2 / 5)
    assert scores["m_avg"] == pytest.approx((100 + 25) / 2)
    assert summary(suites()["mvbench"], records)["overall"] == pytest.approx((100 + 25) / 2)


# ------------------------------------------------------------------------------------------ and lmms-eval's own tasks


@pytest.fixture
def builtin(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """lmms-eval's own module of a benchmark. LongVideoBench's wants decord, which decodes nothing here."""
    decord = types.ModuleType("decord")
    decord.VideoReader = decord.cpu = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "decord", decord)
    return lambda name: importlib.import_module(f"lmms_eval.tasks.{name}.utils")


def ours(name: str, rows: Sequence[dict[str, Any]], texts: Sequence[str], subset: str = "") -> float:
    """Our score of these answers."""
    suite = suites()[name]
    records = [scoring.record(suite, text, suite.question(row, subset)) for row, text in zip(rows, texts, strict=True)]
    return headline(suite, records)


def theirs(module: Any, process: str, aggregate: str, rows: Sequence[dict[str, Any]], texts: Sequence[str]) -> float:
    """The score of lmms-eval's own task, of these answers."""
    results = [getattr(module, process)(row, [text]) for row, text in zip(rows, texts, strict=True)]
    (metric, *_) = results[0]
    return getattr(module, aggregate)([result[metric] for result in results])


def test_longvideobench_reads_the_answer_and_never_guesses(builtin: Callable[[str], Any]) -> None:
    module, rows = builtin("longvideobench"), doubles.longvideobench_rows()[:2]
    score = ("longvideobench_process_results", "longvideobench_aggregate_results")
    assert ours("longvideobench", rows, ["C", "C"]) == 100
    assert theirs(module, *score, rows, ["C", "C"]) == 1.0  # of 1
    # The authors' rule, and lmms-eval's: the first capital from A to E, here that of "Answer".
    assert ours("longvideobench", rows, ["Answer: C", "Answer: C"]) == 100
    assert theirs(module, *score, rows, ["Answer: C", "Answer: C"]) == 0
    # The authors' rule, and lmms-eval's: a letter drawn at random where there is none.
    assert ours("longvideobench", rows * 50, ["no idea"] * 100) == 0
    assert 0 < theirs(module, *score, rows * 50, ["no idea"] * 100) < 1


def test_videomme_counts_answers_without_a_choice(builtin: Callable[[str], Any]) -> None:
    module, rows = builtin("videomme"), [doubles.videomme_rows()[0]] * 2
    score = ("videomme_process_results", "videomme_aggregate_results")
    # The authors leave answers without a choice out: 1 of 1. lmms-eval counts them, as we do.
    assert ours("videomme", rows, ["C", ""]) == theirs(module, *score, rows, ["C", ""]) == 50
    # The authors' rule, the first capital from A to D, and lmms-eval's: a refusal is right by its first letter.
    assert ours("videomme", rows, ["C", "Cannot be determined."]) == 50
    assert theirs(module, *score, rows, ["C", "Cannot be determined."]) == 100
    # The authors' rule says B, as we do; lmms-eval says C, for the cat.
    wordy = ["The answer is (B) because the Cat sleeps"] * 2
    assert ours("videomme", [{**row, "answer": "B"} for row in rows], wordy) == 100
    assert theirs(module, *score, [{**row, "answer": "B"} for row in rows], wordy) == 0


def test_mvbench_counts_empty_answers_and_reads_no_article(builtin: Callable[[str], Any]) -> None:
    module, rows = builtin("mvbench"), [doubles.mvbench_rows(0)[1]] * 2
    score = ("mvbench_process_results", "mvbench_aggregate_results")
    # The authors count every question, as we do; lmms-eval leaves empty answers out.
    assert ours("mvbench", rows, ["(C)", ""], "action_count") == 50
    assert theirs(module, *score, rows, ["(C)", ""]) == 100
    # The authors' rule, the first word whatever its case, and lmms-eval's: an article is the letter A.
    first = [{**row, "answer": "one"} for row in rows]
    assert ours("mvbench", first, ["a dog", "A"], "action_count") == 50
    assert theirs(module, *score, first, ["a dog", "A"]) == 100


def test_mlvu_takes_the_mean_of_what_was_asked(builtin: Callable[[str], Any]) -> None:
    module, rows = builtin("mlvu"), doubles.mlvu_rows()
    score = ("mlvu_process_results", "mlvu_aggregate_results_dev")
    # All seven tasks: needle 2 of 3, ego and order right.
    assert ours("mlvu", rows, ["C"] * 9) == pytest.approx((200 / 3 + 100 + 100) / 7)
    assert theirs(module, *score, rows, ["C"] * 9) == pytest.approx((200 / 3 + 100 + 100) / 7)
    # One task: the authors take the mean of the tasks that were run, as we do; lmms-eval divides by seven.
    assert ours("mlvu", rows[3:4], ["C"]) == 100
    assert theirs(module, *score, rows[3:4], ["C"]) == pytest.approx(100 / 7)


def test_lvbench_scores_as_lmms_eval_does(builtin: Callable[[str], Any]) -> None:
    module, rows = builtin("lvbench"), doubles.lvbench_rows()
    for text in ("C", "(A)", ""):
        right = [module.lvbench_process_results(row, [text])["lvbench_score"] for row in rows]
        assert ours("lvbench", rows, [text] * 2) == 100 * sum(right) / 2


def test_official_scores_are_those_of_lmms_eval(builtin: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On the key of replies, without reasoning, and on thousands of crumbs of such replies."""
    rng = random.Random(0)
    crumbs = [
        "A",
        "B",
        "D",
        "E",
        "(A)",
        "(B)",
        "C.",
        "D:",
        "B)",
        "**C**",
        "the answer is",
        "Answer:",
        "I choose",
        "dog",
    ]
    crumbs += [
        "Because",
        "选",
        " ",
        "\n",
        ",",
        ".",
        "'",
        "a",
        "(c)",
        "Cannot",
        "答案是",
        "A dog",
        "E)",
        "1,000",
        "0.5",
        "!",
    ]
    crumbs += ["The best answer is", "The answer", "Best option:", "b. a man", '"', "-", " - ", "..."]
    key = Path(__file__).with_name("answers.jsonl").read_text(encoding="utf-8").splitlines()
    replies = [without_reasoning(json.loads(line)["reply"]) for line in key]
    replies += ["".join(f"{crumb} " * rng.randint(0, 1) or crumb for crumb in rng.choices(crumbs, k=rng.randint(0, 7)))
                for _ in range(4000)]  # fmt: skip
    drawn = object()
    video_mme, mlvu, lvbench, mvbench, long = map(builtin, ("videomme", "mlvu", "lvbench", "mvbench", "longvideobench"))
    monkeypatch.setattr(long.random, "choice", lambda letters: drawn)
    for reply in replies:
        letter = video_mme.extract_characters_regex(reply)
        assert letter == mlvu.extract_characters_regex(reply) == lvbench.extract_characters_regex(reply)
        for name in ("videomme", "videomme_subtitles", "mlvu", "lvbench"):
            assert [official_score(name, reply, "ABCD", each) for each in "ABCD"] == [
                100.0 * (letter == each) for each in "ABCD"
            ], reply
        assert [official_score("mvbench", reply, "ABCDE", each) for each in "ABCDE"] == [
            100.0 * mvbench.mcq_acc(each, reply) if reply else None for each in "ABCDE"
        ], reply
        parsed = long.parse_multi_choice_response(reply, list("ABCD"), {})
        assert [official_score("longvideobench", reply, "ABCD", each) for each in "ABCD"] == [
            25.0 if parsed is drawn else 100.0 * (parsed == each) for each in "ABCD"
        ], reply
    # And as a whole: MVBench leaves empty replies out, MLVU and MVBench are means of their tasks.
    rows = [doubles.mvbench_rows(0)[1]] * 3
    scores = [record("mvbench", text, "ABC", "C", "action_count") for text in ("(C)", "", "a dog")]
    module_score = theirs(mvbench, "mvbench_process_results", "mvbench_aggregate_results", rows, ["(C)", "", "a dog"])
    assert official(suites()["mvbench"], scores) == module_score == 50
    groups = [
        record("mlvu", text, "ABCD", "C", group) for text, group in (("C", "ego"), ("C", "count"), ("A", "count"))
    ]
    assert official(suites()["mlvu"], groups) == 75


def test_official_scores_of_further_suites_are_those_of_lmms_eval(builtin: Callable[[str], Any]) -> None:
    rng = random.Random(1)
    crumbs = ["A", "C", "F", "H", "K", "(B)", "C.", "**D**", "**E.", "the answer is", "Answer:", "Final Answer:", "dog"]
    crumbs += [
        "option would be G",
        "thing 3",
        "thing 5",
        "\n",
        "\nB\n",
        "a",
        "up",
        "Left",
        "down",
        "The best option is",
    ]
    crumbs += ["The correct option is", "Best answer:", "x", "x y z", "Z", "(", ")", ".", " ", "because it is so"]
    replies = [" ".join(rng.choices(crumbs, k=rng.randint(0, 8))) for _ in range(1200)]
    key = Path(__file__).with_name("answers.jsonl").read_text(encoding="utf-8").splitlines()
    replies += [without_reasoning(json.loads(line)["reply"]) for line in key]
    short, long, second, pro, clues, order = map(
        builtin, ("timescope", "longtimescope", "videomme_v2", "videoevalpro", "cgbench", "tvbench")
    )
    (v2_row, *_), (pro_row, *_) = doubles.videomme_v2_rows(), doubles.videoevalpro_rows()
    (tv_row,), (clue_row, *_) = doubles.tvbench_rows(0), doubles.cgbench_rows()
    v2_options, tv_options = v2_row["options"].split("\n"), tv_row["candidates"]
    for reply in replies:
        for answer in "ACF":
            assert official_score("timescope", reply, "ABCDEF", answer) == 100.0 * (
                short.extract_characters_regex(reply) == answer
            ), reply
            assert official_score("longtimescope", reply, "ABCDEF", answer) == 100.0 * (
                long.extract_characters_regex(reply) == answer
            ), reply
            theirs_v2 = second.videomme_v2_process_results({**v2_row, "answer": answer}, [reply])
            assert (
                official_score("videomme_v2", reply, "ABCDEFGH", answer, v2_options)
                == 100.0 * (theirs_v2["videomme_v2_overall_acc"]["score"])
            ), reply
            theirs_cg = clues.cgbench_process_results({**clue_row, "right_answer": answer}, [reply])
            assert (
                official_score("cgbench", reply, "ABCDEFGH", answer) == 100.0 * theirs_cg["cgbench_accuracy"]["score"]
            )
        for answer in "ACE":
            theirs_pro = pro.videoevalpro_mcq_process_results({**pro_row, "answer": answer}, [reply])
            assert (
                official_score("videoevalpro", reply, "ABCDE", answer)
                == 100.0 * (theirs_pro["videoevalpro_mcq_score"]["correct"])
            ), reply
        for answer, text in zip("ABC", tv_options, strict=True):
            theirs_tv = order.tvbench_process_results({**tv_row, "answer": text}, [reply])["tvbench_acc"]
            assert official_score("tvbench", reply, "ABC", answer, tv_options) == 100.0 * theirs_tv, reply
        letter = builtin("mlvu").extract_characters_regex(reply)
        assert official_score("mlvu_test", reply, "ABCDEF", "D") == 100.0 * (letter == "D")


def test_group_scores_of_videomme_v2_are_those_of_lmms_eval(builtin: Callable[[str], Any]) -> None:
    """Every pattern of right and wrong answers, of each kind of group; the answers come in any order."""
    module, suite, rng = builtin("videomme_v2"), suites()["videomme_v2"], random.Random(0)
    for kind, structure in (
        ("relevance", "[1, 2, 3, 4]"),
        ("logic", "[1, 2, 3, 4]"),
        ("logic", "[1,[2,3],4]"),
        ("logic", "[[1, 2], 3, 4]"),
    ):
        rows = [{**row, "group_type": kind, "group_structure": structure} for row in doubles.videomme_v2_rows()[:4]]
        for pattern in range(16):
            texts = [row["answer"] if pattern >> i & 1 else "G" for i, row in enumerate(rows)]
            results = [
                module.videomme_v2_process_results(row, [text])["videomme_v2_overall_score"]
                for row, text in zip(rows, texts, strict=True)
            ]
            order = rng.sample(range(4), 4)
            mine = ours("videomme_v2", [rows[i] for i in order], [texts[i] for i in order])
            assert mine == pytest.approx(module.videomme_v2_aggregate_overall_score(results)), (structure, texts)
    # By hand: three of four ways to ask one thing are 9/16; of steps 1, (2 3), 4 the first and third alone 4/12.
    assert ours("videomme_v2", doubles.videomme_v2_rows()[:4], "CCGC") == pytest.approx(100 * 9 / 16)
    assert ours("videomme_v2", doubles.videomme_v2_rows()[4:], "CGBG") == pytest.approx(100 * 4 / 12)
    for bad in ({"group_type": "other"}, {"group_type": "logic", "group_structure": "__import__('os')"}):
        with pytest.raises(ValueError, match="A group must be of the type relevance, or logic with a structure among"):
            suite.question({**doubles.videomme_v2_rows()[0], **bad})


def test_errors_and_numbers_of_questions_are_those_of_lmms_eval_s_tools() -> None:
    from lmms_eval.api.metrics import clustered_stderr, paired_ttest, power_analysis

    rng = random.Random(0)
    chances = [rng.random() for _ in range(400)]
    first, second = ([100.0 * (rng.random() < chance * ease) for chance in chances] for ease in (0.8, 0.9))
    z = NormalDist().inv_cdf(0.995) + NormalDist().inv_cdf(0.8)
    alone = difference(*([Unit(str(i), "", str(i), x) for i, x in enumerate(each)] for each in (first, second)))
    theirs = paired_ttest(second, first)
    assert alone.points == pytest.approx(theirs["mean_diff"])
    assert alone.detectable_points == pytest.approx(z * theirs["se_diff"])
    power = power_analysis(
        abs(theirs["mean_diff"]), stdev(first), stdev(second), alpha=0.01, correlation=correlation(first, second)
    )
    assert alone.needed == power["min_n"]
    together = difference(*([Unit(str(i), "", str(i // 4), x) for i, x in enumerate(each)] for each in (first, second)))
    changes = [b - a for a, b in zip(first, second, strict=True)]
    error = clustered_stderr(changes, [i // 4 for i in range(400)])
    assert together.detectable_points == pytest.approx(z * error, rel=0.01)  # theirs divides by n, ours by V - 1


def test_prompts_are_those_of_lmms_eval(builtin: Callable[[str], Any]) -> None:
    def kwargs(file: str) -> dict[str, Any]:
        text = Path(importlib.import_module("lmms_eval.tasks").__file__, "..", file).resolve().read_text("utf-8")
        kept = [line for line in text.splitlines() if "!function" not in line]
        return yaml.safe_load("\n".join(kept))["lmms_eval_specific_kwargs"]["default"]

    cases = [
        ("longvideobench", "longvideobench/longvideobench_val_v.yaml", doubles.longvideobench_rows()[:2], ""),
        ("mlvu", "mlvu/mlvu_dev.yaml", doubles.mlvu_rows()[:1], ""),
        ("videomme", "videomme/videomme.yaml", doubles.videomme_rows()[:1], ""),
        ("mvbench", "mvbench/mvbench_action_count.yaml", doubles.mvbench_rows(0), "action_count"),
        ("lvbench", "lvbench/lvbench.yaml", doubles.lvbench_rows()[:1], ""),
        ("videomme_v2", "videomme_v2/videomme_v2.yaml", doubles.videomme_v2_rows()[:1], ""),
        ("videoevalpro", "videoevalpro/videoevalpro_mcq.yaml", doubles.videoevalpro_rows()[:1], ""),
        ("cgbench", "cgbench/_default_template_yaml", doubles.cgbench_rows()[:1], ""),
        ("tvbench", "tvbench/_default_template_yaml", doubles.tvbench_rows(0), "action_count"),
    ]
    for name, file, rows, subset in cases:
        prompt = getattr(builtin(name), f"{name}{'_mcq' if name == 'videoevalpro' else ''}_doc_to_text")
        for row in rows:
            assert suites()[name].question(row, subset).text == prompt(row, kwargs(file)), name
    # These are asked as the row has them, without an instruction.
    assert suites()["timescope"].question(doubles.timescope_rows()[0]).text == doubles.timescope_rows()[0]["input"]
    row = doubles.mlvu_test_rows()[1]
    assert suites()["mlvu_test"].question(row).text == builtin("mlvu").mlvu_doc_to_text(row) == row["question"]
    assert suites()["mlvu_test"].question(row).letters == "ABCDEF"


def test_data_are_where_lmms_eval_has_them(builtin: Callable[[str], Any]) -> None:
    tasks = Path(importlib.import_module("lmms_eval.tasks").__file__).parent
    files = {
        "longvideobench": "longvideobench/longvideobench_val_v.yaml",
        "mlvu": "mlvu/mlvu_dev.yaml",
        "videomme": "videomme/videomme.yaml",
        "mvbench": "mvbench/_default_template_yaml",
        "lvbench": "lvbench/lvbench.yaml",
        "mlvu_test": "mlvu/mlvu_test.yaml",
        "timescope": "timescope/timescope.yaml",
        "longtimescope": "longtimescope/longtimescope.yaml",
        "videomme_v2": "videomme_v2/_default_template_yaml",
        "videoevalpro": "videoevalpro/videoevalpro_mcq.yaml",
        "cgbench": "cgbench/_default_template_yaml",
        "tvbench": "tvbench/_default_template_yaml",
    }
    assert {*files, "videomme_subtitles"} == set(suites())
    for name, file in files.items():
        lines = (tasks / file).read_text(encoding="utf-8").splitlines()
        config = yaml.safe_load("\n".join(line for line in lines if "!function" not in line))
        benchmark = suites()[name]
        assert benchmark.dataset == config["dataset_path"]
        assert benchmark.media == config["dataset_kwargs"]["cache_dir"]
        assert benchmark.revision == config["dataset_kwargs"].get("revision")
        assert benchmark.split == config.get("test_split", "train")
        assert benchmark.config == config.get("dataset_name")
    folders = builtin("mvbench").DATA_LIST
    assert set(suites()["mvbench"].subsets) == set(folders)
    for subset, folder in folders.items():
        video = suites()["mvbench"].question(doubles.mvbench_rows(0)[0], subset).videos[0]
        assert video == f"mvbench_video/{folder}/v0.mp4"


def test_rows_are_those_of_the_folder_as_it_is_now(tmp_path: Path) -> None:
    """The cache of datasets tells no two folders of one name and card apart."""
    for number, root in enumerate((tmp_path / "a", tmp_path / "b", tmp_path / "a")):
        shutil.rmtree(root, ignore_errors=True)
        rows = [{**row, "video_name": f"{number}.mp4"} for row in doubles.mlvu_rows()[number:]]
        doubles.write_parquet(root / "sy1998/MLVU_dev", {"test": rows})
        _rows.cache_clear()  # as in another process
        assert suites()["mlvu"].rows(root).to_list() == rows


# ----------------------------------------------------------------------------------------------------- bad rows, files


def test_a_row_of_another_schema_names_the_field() -> None:
    row = {key: value for key, value in doubles.mlvu_rows()[0].items() if key != "video_name"}
    with pytest.raises(ValueError, match=r"sy1998/MLVU_dev, test, a row: It lacks the field 'video_name'"):
        suites()["mlvu"].question(row)


def test_an_answer_that_is_no_option_is_an_error() -> None:
    with pytest.raises(ValueError, match="must be one of 'AB', got ''"):
        suites()["mvbench"].question({**doubles.mvbench_rows(0)[0], "answer": "five"}, "action_count")


def test_letters_of_a_text_that_lists_its_options() -> None:
    assert letters_of("What?\n(A) one\n(B) two\n(C) three") == "ABC"
    assert letters_of("What?\nA. one\n B) two\nC: three\nE. five") == "ABC"
    assert letters_of("A. Who is A. Smith?") == letters_of("What is it?") == ""


@pytest.mark.parametrize(
    "name", ["../secret.mp4", "mlvu/../../secret.mp4", "/etc/hostname", "mlvu/out.mp4", "mlvu/a\0"]
)
def test_no_file_leads_out_of_the_media_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.mp4").write_text("x")
    root = tmp_path / "root"
    (root / "mlvu").mkdir(parents=True)
    (root / "mlvu" / "out.mp4").symlink_to(tmp_path / "secret.mp4")
    with pytest.raises(ConfigError, match=r"mlvu: a row names a file outside .*must name a file inside .*root/mlvu"):
        suites()["mlvu"].locate(root, name)


def test_a_media_folder_may_be_a_link_and_a_snapshot_of_the_hub(tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "datasets--sy1998--MLVU_dev"
    (repo / "blobs").mkdir(parents=True)
    (repo / "blobs" / "01").write_text("x")
    snapshot = repo / "snapshots" / "4567"
    snapshot.mkdir(parents=True)
    (snapshot / "a.mp4").symlink_to("../../blobs/01")
    root = tmp_path / "root"
    root.mkdir()
    (root / "mlvu").symlink_to(snapshot)
    mlvu = suites()["mlvu"]
    assert mlvu.locate(root, "mlvu/none.mp4", "mlvu/a.mp4") == root / "mlvu" / "a.mp4"
    assert mlvu.locate(root, "mlvu/none.mp4") is None


def test_every_name_of_a_row_is_in_its_suite_s_media_folder() -> None:
    for suite in suites().values():
        subset = suite.subsets[0] if suite.subsets else ""
        question = suite.question(doubles.a_row(suite.asked_with or suite.name), subset)
        assert all(name.startswith(f"{suite.media}/") for name in question.videos), suite.name
        assert not question.subtitles or question.subtitles.startswith(f"{suite.media}/"), suite.name


def test_subtitles_are_those_of_the_instants(tmp_path: Path) -> None:
    path = tmp_path / "x.srt"
    path.write_text(
        "\ufeff1\n00:00:00,500 --> 00:00:02,000\n<i>Hello</i>\nthere &amp; here\n\n"
        "2\n00:01:00,000 --> 00:01:01,250\n42\n\n3\n01:00:00.000 --> 01:00:02.000\n7\n",
        encoding="utf-8",
    )
    subtitles = read_srt(path)
    assert subtitles == [
        Subtitle(0.5, 2.0, "Hello there & here"),
        Subtitle(60.0, 61.25, "42"),
        Subtitle(3600.0, 3602.0, "7"),
    ]
    assert shown_at(subtitles, [0.49, 2.0, 61.25]) == []  # [start, end)
    assert shown_at(subtitles, [3600.0, 1.0, 0.5]) == ["Hello there & here", "7"]
    path.write_text("1\n00:00:01,000 --> 00:00:02,000 X1:40 X2:600\nI <3 you\n<b>and 5 > 4</b>\n")
    assert read_srt(path) == [Subtitle(1.0, 2.0, "I <3 you and 5 > 4")]
    path.write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"x\.srt is no SRT file"):
        read_srt(path)
