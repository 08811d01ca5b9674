"""`python -m kdlib <command>`: what the Makefile and the graph of stages call.

Exit codes: 0 done, 1 refused with a message, 2 wrong arguments, 130 interrupted.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from kdlib.errors import UserError

Parser = argparse.ArgumentParser


@dataclass(frozen=True)
class Command:
    """A command: what it does, an example, its arguments, and the function that runs it."""

    about: str
    example: str
    arguments: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], None]
    hidden: bool = False  # called by the graph of stages alone


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = Parser(prog="python -m kdlib", description="Knowledge distillation in dysarthric speech recognition.")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, command in COMMANDS.items():
        shown = {} if command.hidden else {"help": command.about}
        own = commands.add_parser(
            name,
            description=command.about,
            epilog=f"example: python -m kdlib {name} {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **shown,
        )
        if name in arguments[:1]:
            command.arguments(own)
    options = parser.parse_args(arguments)
    try:
        COMMANDS[options.command].run(options)
    except UserError as error:
        print(f"\n{error}\n", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        print(f"\n{stopped or 'interrupted'}; run the same command again to resume", file=sys.stderr)
        return 130
    return 0


def _in(module: str) -> dict[str, Callable]:
    """The arguments of a command and its function, as a module has them; it is imported when they are called."""
    return {
        "arguments": lambda parser: import_module(module).add_arguments(parser),
        "run": lambda options: import_module(module).run(options),
    }


def names(text: str) -> list[str]:
    """The names of a comma-separated list."""
    return [name for name in text.split(",") if name]


def numbers(text: str) -> list[int]:
    """The numbers of a comma-separated list."""
    return [int(name) for name in names(text)]


def _recipe(parser: Parser) -> None:
    parser.add_argument("recipe", help="such as params/demo.yaml")


def _folds(parser: Parser) -> None:
    _recipe(parser)
    parser.add_argument("folds", type=names, help="held-out speakers, comma-separated")


def _prepare_arguments(parser: Parser) -> None:
    _folds(parser)
    parser.add_argument("--teachers", action="store_true", help="what teachers need, too: the base model")


def _shared_folds(parser: Parser) -> None:
    _folds(parser)
    parser.add_argument("--share", default="1/1", help="of the work: 1/2 and 2/2 for two processes")


def _prepare(options: argparse.Namespace) -> None:
    from kdlib.pipeline import Fold

    for held_out in options.folds:
        Fold.load(options.recipe, held_out).prepare(scores=len(options.folds) > 1, teachers=options.teachers)


def _teachers(options: argparse.Namespace) -> None:
    from kdlib.pipeline import Fold, teachers_of

    for fold, name in teachers_of([Fold.load(options.recipe, held_out) for held_out in options.folds], options.share):
        fold.teacher_scores(name)
        fold.with_parents([name])


def _outputs(options: argparse.Namespace) -> None:
    from kdlib.pipeline import Fold, teachers_of

    for fold, name in teachers_of([Fold.load(options.recipe, held_out) for held_out in options.folds], options.share):
        fold.outputs(name, "training")


def _students(options: argparse.Namespace) -> None:
    from kdlib.pipeline import Fold
    from kdlib.teachers.teacher_sets import share_of

    for held_out in options.folds:
        fold = Fold.load(options.recipe, held_out)
        for variant, seed in share_of(fold.students(), options.share):
            fold.of(variant).examination(seed)


def _student_arguments(parser: Parser) -> None:
    _recipe(parser)
    parser.add_argument("held_out")
    parser.add_argument("variant")
    parser.add_argument("seed", type=int)


def _student(options: argparse.Namespace) -> None:
    from kdlib.pipeline import Fold

    print(Fold.load(options.recipe, options.held_out, options.variant).scores(options.seed))


def _train_process_arguments(parser: Parser) -> None:
    parser.add_argument("folder", type=Path)
    parser.add_argument("seed", type=int)


def _train_process(options: argparse.Namespace) -> None:
    from kdlib.params import Params
    from kdlib.pipeline import Fold
    from kdlib.runtime import end_with_parent

    end_with_parent()
    params = Params.model_validate_json((options.folder / "params.json").read_text(encoding="utf-8"))
    Fold(params).train_student(options.folder, options.seed, alone=True)


def _ship_arguments(parser: Parser) -> None:
    _recipe(parser)
    parser.add_argument("--ship", action="store_true", help="copy it into the package")


def _pretrained(options: argparse.Namespace) -> None:
    from kdlib.params import load_recipe
    from kdlib.pipeline import Fold
    from kdlib.pretrained.model import ship

    path = Fold(load_recipe(options.recipe, {"pretrained": "controls"})).pretrained_model()
    ship(path) if options.ship else print(path)


def _base_model(options: argparse.Namespace) -> None:
    from kdlib.params import load_recipe
    from kdlib.pipeline import Fold
    from kdlib.teachers.base_model import ship

    path = Fold(load_recipe(options.recipe, {"teacher": {"parent": "controls"}})).base_model()
    ship(path) if options.ship else print(path)


def _fold_files(options: argparse.Namespace) -> None:
    from kdlib.corpus.fold_files import write_fold_files
    from kdlib.io import repository_root
    from kdlib.params import load_recipe
    from kdlib.pipeline import Fold

    params = load_recipe(options.recipe)
    folder = repository_root() / "params" / "folds" / params.fold_set
    write_fold_files(Fold(params).corpus, folder, options.recipe)


def _compare_arguments(parser: Parser) -> None:
    _folds(parser)
    parser.add_argument("--variants", type=names, default=[], help="by default all that the recipe compares")
    parser.add_argument("--seeds", type=numbers, default=[])
    parser.add_argument("--ensembles", type=names, default=[], help="of the recipe")


def _compare(options: argparse.Namespace) -> None:
    from kdlib.show.fold_comparison import compare_folds

    compare_folds(options.recipe, options.folds, options.variants, options.seeds, options.ensembles)


def _verdict_arguments(parser: Parser) -> None:
    from kdlib.evaluate import compare

    compare.add_arguments(parser)


def _verdict(options: argparse.Namespace) -> None:
    from kdlib.evaluate.compare import compare_files
    from kdlib.show.format import verdict_table

    verdicts = compare_files(options)
    print(verdict_table(verdicts).to_string(index=False))
    for verdict in verdicts:
        print(verdict.text)


def _evaluate_arguments(parser: Parser) -> None:
    parser.add_argument("checkpoint", type=Path, help="the folder of a saved model, or a .nemo file")
    parser.add_argument("manifest", type=Path, help="SpeechBrain CSV or NeMo JSON lines")
    parser.add_argument("--tokenizer", type=Path, help="for a check: must be the model's own")
    parser.add_argument("--max-decode-len", type=int, help="of the attention decoder, in tokens")
    parser.add_argument("--lexicon", type=Path, help="one word (tab, spelling) per line; by default all transcripts")
    parser.add_argument("--calibration", type=Path, help="calibration.json; by default the checkpoint's own")
    parser.add_argument("--calibrate-on", type=Path, help="manifest of training speech to calibrate the lexicon on")
    parser.add_argument("--lm", type=Path, help="ARPA file of words, for beam search")
    parser.add_argument("--lm-weight", type=float, default=0.9, help="weight of its natural log-probabilities")
    parser.add_argument("--word-bonus", type=float, default=0.0, help="nats per word")
    parser.add_argument("--beam", type=int, default=20, help="hypotheses kept")
    parser.add_argument("--data-folder", type=Path, help="what $data_folder stands for in the manifest")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--out", type=Path, help="by default outputs/evaluations/<checkpoint>-<manifest>")


def _evaluate(options: argparse.Namespace) -> None:
    from kdlib.evaluate.checkpoint import Options, evaluate
    from kdlib.io import repository_root
    from kdlib.show.format import headline

    name = "-".join([*options.checkpoint.resolve().parts[-4:], options.manifest.stem])
    out = options.out or repository_root() / "outputs" / "evaluations" / name
    chosen = {field: getattr(options, field) for field in Options.__dataclass_fields__}
    print(headline(evaluate(options.checkpoint, options.manifest, out, Options(**chosen))).to_string())
    print(f"written to {out}")


def _ablations_arguments(parser: Parser) -> None:
    _recipe(parser)
    parser.add_argument("folds", type=names, nargs="?", default=[], help="held-out speakers; by default the set's own")
    parser.add_argument("--plan", action="store_true", help="what the set would cost, alone")
    parser.add_argument("--budget", type=float, help="hours; a longer run is refused")
    parser.add_argument("--seeds", type=names, default=[], help="by default the recipe's")


def _ablations(options: argparse.Namespace) -> None:
    from kdlib.show import ablations

    if options.plan:
        ablations.print_plan(options.recipe, options.folds, options.seeds, options.budget)
    else:
        ablations.print_results(options.recipe, options.folds)


def _power_arguments(parser: Parser) -> None:
    parser.add_argument("--folds", type=numbers, default=[4, 15], help="numbers of folds, comma-separated")
    parser.add_argument("--seeds", type=numbers, default=[2, 3, 5], help="numbers of seeds")
    parser.add_argument("--utterances", type=int, default=96, help="of each held-out speaker")
    parser.add_argument("--pairs", type=int, default=1, help="comparisons that are corrected for")
    parser.add_argument("--recipe", default="", help="whose scored students give the spreads; else they are assumed")
    parser.add_argument("--decoder", default="lexicon", help="of these students")


def _power(options: argparse.Namespace) -> None:
    from kdlib.evaluate.power import Plan
    from kdlib.show import power

    plan = Plan(options.folds[0], options.utterances, options.seeds[0], options.pairs)
    power.run(options.folds, options.seeds, plan, options.recipe, options.decoder)


def _figures_arguments(parser: Parser) -> None:
    _recipe(parser)
    parser.add_argument("folds", type=names, nargs="?", default=[], help="held-out speakers; by default all")
    parser.add_argument("--document", default="thesis", help="class whose width figures have: thesis, article, ...")
    parser.add_argument("--systems", nargs="*", default=[], help="name=file,file: other people's results instead")
    parser.add_argument("--out", type=Path, help="by default figures/thesis/ in the recipe's folder")


def _figures(options: argparse.Namespace) -> None:
    from kdlib.show import thesis

    pairs = [text.partition("=")[::2] for text in options.systems]
    systems = {name: [Path(path) for path in names(paths)] for name, paths in pairs}
    thesis.run(options.recipe, options.folds, systems, options.out, options.document)


def _export_arguments(parser: Parser) -> None:
    parser.add_argument("student", type=Path, help="the folder of a student")
    parser.add_argument("nemo", type=Path, help="the .nemo file to write")


def _export(options: argparse.Namespace) -> None:
    from kdlib.evaluate.checkpoint import export_calibration
    from kdlib.models.export import export

    path = export(options.student, options.nemo)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    calibration = export_calibration(options.student, options.nemo)
    print(f"{calibration or 'no calibration of its closed lexicon: the student was not scored, or not calibrated'}")


def _follow_arguments(parser: Parser) -> None:
    parser.add_argument("label")
    parser.add_argument("--warnings", type=Path, required=True)
    parser.add_argument("--traceback", type=Path, help="file for that of a job that is no notebook")


def _follow(options: argparse.Namespace) -> None:
    from kdlib.console import follow

    follow(options.label, sys.stdin, options.warnings, options.traceback)


def _explain_arguments(parser: Parser) -> None:
    parser.add_argument("notebook", type=Path)


def _explain(options: argparse.Namespace) -> None:
    from kdlib.console import explain_failure

    raise UserError(explain_failure(options.notebook))


COMMANDS = {
    "folds-for": Command("Write the fold files of a recipe's corpus.", "params/own.yaml", _recipe, _fold_files),
    "prepare": Command(
        "Make what several jobs need: tokens, models, scores without training.",
        "params/demo.yaml M08 --teachers",
        _prepare_arguments,
        _prepare,
    ),
    "teachers": Command(
        "Train and score the teachers that folds use.", "params/demo.yaml M08,M05 --share 1/2", _shared_folds, _teachers
    ),
    "outputs": Command(
        "Store the teachers' outputs on training speech.", "params/demo.yaml M08 --share 1/2", _shared_folds, _outputs
    ),
    "student": Command("Train and score a student.", "params/demo.yaml M08 ctc_kd 1", _student_arguments, _student),
    "students": Command(
        "Train, score and examine all students of a recipe.",
        "params/ablations/collapse.yaml M08 --share 1/2",
        _shared_folds,
        _students,
    ),
    "compare": Command(
        "Compare the students of folds with their controls.",
        "params/demo.yaml M08,M05 --variants ctc_kd --seeds 1,2",
        _compare_arguments,
        _compare,
    ),
    "verdict": Command(
        "Compare the hypotheses of any systems.", "hard=DIR kd=DIR --against hard", _verdict_arguments, _verdict
    ),
    "examine": Command(
        "Find out what is wrong with predictions.",
        "evaluation.json --tokenizer tokenizer.model",
        **_in("kdlib.show.examination_page"),
    ),
    "matrix": Command("Teachers on speakers.", "RESULTS --measure wra", **_in("kdlib.show.cross_tests")),
    "audit": Command("Audit logits of other code.", "LOGITS --manifest corpus.csv", **_in("kdlib.logits.audit")),
    "evaluate": Command(
        "Score a saved model on a manifest.", "outputs/.../seed1 corpus.csv", _evaluate_arguments, _evaluate
    ),
    "ablations": Command(
        "Results of a set of ablations, or with --plan what it costs.",
        "params/ablations/temperature.yaml --plan",
        _ablations_arguments,
        _ablations,
    ),
    "cost": Command("What some folds cost, by stage.", "params/demo.yaml M08,M05", **_in("kdlib.show.plan")),
    "tune": Command("Search settings on a dev speaker.", "params/demo.yaml M08 --runs 12", **_in("kdlib.tuning")),
    "power": Command("What difference a study can show.", "--folds 4,15 --seeds 2,3", _power_arguments, _power),
    "figures": Command("Figures and tables for a thesis.", "params/grid.yaml", _figures_arguments, _figures),
    "export": Command("Write a student as a .nemo file.", "outputs/.../seed1 student.nemo", _export_arguments, _export),
    "pretrained": Command(
        "Train the pretrained model on controls.", "params/shipped.yaml --ship", _ship_arguments, _pretrained
    ),
    "base-model": Command(
        "Train the teachers' base model on controls.", "params/shipped.yaml --ship", _ship_arguments, _base_model
    ),
    "train-process": Command(
        "Train a student on several devices.", "FOLDER 1", _train_process_arguments, _train_process, hidden=True
    ),
    "follow": Command(
        "Filter the log of a job.", "01_baseline --warnings FILE", _follow_arguments, _follow, hidden=True
    ),
    "explain": Command("Print why a notebook failed.", "out.ipynb", _explain_arguments, _explain, hidden=True),
}

if __name__ == "__main__":
    sys.exit(main())
