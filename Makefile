# The commands. Each sets up .venv once, from requirements.lock.
#   make demo   one fold of the embedded corpus, from the corpus to a distilled student and its hard-label control
#               (HELD_OUT=M05 for another speaker)
#   make test   the tests, in JOBS=2 processes
#   make folds-for RECIPE=...          write the fold files of your own corpus
#   make folds RECIPE=... FOLDS=A,B    run some of its folds (FOLDS=all for all; UNTIL=baseline stops after 01_baseline), and
#                                      print one table of all systems, with verdicts
#   make compare                       students for each of VARIANTS, SEEDS=1,2 and ENSEMBLES, in one fold or FOLDS=A,B;
#                                      their table, and verdicts against their controls
#   make ablations SET=temperature     one set of params/ablations/: what it costs (BUDGET_H=2 refuses more), its students,
#                                      tables, effects and figures (notebook 06)
#   make tune HELD_OUT=M08             search the settings that RECIPE names (tune: ...) on the fold's dev speaker (VARIANT=, RUNS=)
#   make figures CLASS=article         figures, tables and numbers for a thesis, from all results of RECIPE (notebook 07)
#   make power OF_FOLDS=4,15 OF_SEEDS=2,3,5   the smallest difference that such a study can show (RECIPE=...: by the spreads
#                                      of its students; UTTERANCES=, PAIRS=)
#   make collapse                      which causes collapse a student? Each made on purpose: 104 small students, an hour
#   make verdict SYSTEMS="A=... B=..."  compare any result files (DECODER=..., MEASURE=wer, AGAINST=..., REFERENCES=...)
#   make examine EVAL=... TOKENIZER=...   what is wrong with these predictions? any result file, seconds, no model
#   make matrix RESULTS=...             every teacher on every speaker, from result files: teacher_M04/wer_M08.txt
#   make audit LOGITS=...               what logits of other code hold, and whose speech they are of (MANIFEST=..., TOKENIZER=...)
#   make evaluate CHECKPOINT=... MANIFEST=...   score any saved model on any manifest
#   make export CHECKPOINT=... NEMO=...         write a student as a .nemo file
#   make lab                           JupyterLab on the notebooks
#   make setup                         set up .venv alone; one that has the locked versions, also a link to another
#                                      clone's, is used as it is
#   make dry-run, make report          what would be run (PROFILE=slurm: the jobs of a cluster); Snakemake's report of what was
#   make cost RECIPE=... FOLDS=A,B     what these folds take: runs, hours and bytes by stage, and what a cluster's jobs ask for
#   make cluster RECIPE=... FOLDS=A,B  the folds on a Slurm cluster (docs/cluster.md)
#   make pretrained, make parent       train the shipped pretrained model, or the teachers' shipped base model, anew
#   make bench                         measure the figures of docs/benchmarks.md
#   make unchanged AGAINST=HEAD        does a change of the code change any value? runs everything once before and after
#   make lint, make lock               check the code; pin every version anew
comma    := ,
RECIPE   ?= params/demo.yaml
HELD_OUT ?= M08
FOLDS    ?= M08,M05,M16,M01,M04
# of make compare; with RECIPE=... the recipe's own
VARIANTS ?= $(if $(filter file,$(origin RECIPE)),hard$(comma)ctc_kd$(comma)ctc_kd_same_checkpoint$(comma)ctc_kd_same_level$(comma)ctc_kd_only$(comma)decoder_kd$(comma)decoder_hard)
SEEDS    ?= $(if $(filter file,$(origin RECIPE)),1$(comma)2)
JOBS     ?= 2
BIN      := .venv/bin
KDLIB    := $(BIN)/python -m kdlib
READY    := .venv/.ready-$(firstword $(shell cat requirements.lock pyproject.toml | cksum))
SNAKEMAKE := $(BIN)/snakemake --profile profiles/local $(if $(UNTIL),--until $(UNTIL))

export OMP_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1
export PYTHONWARNINGS ?= ignore::SyntaxWarning
# This clone's kdlib, also with the .venv of another clone.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

.PHONY: setup install demo test folds folds-for dry-run cost cluster report compare ablations tune power figures collapse verdict examine audit matrix evaluate export lab pretrained parent bench faults unchanged lint lock help

help:
	@sed -n 's/^#   //p' Makefile

# $(call option,NAME,--flag): --flag "value" where the variable NAME has a value
option = $(if $($1),$2 "$($1)")
# the variants and seeds of the command line: for the graph, and for a command
NAMED = $(foreach name,VARIANTS SEEDS,$(if $(filter command environment,$(origin $(name))),$(name)))
CHOSEN = $(if $(filter VARIANTS,$(NAMED)),variants="$(VARIANTS)") $(if $(filter SEEDS,$(NAMED)),seeds="$(SEEDS)")
CHOSEN_OPTIONS = $(if $(filter VARIANTS,$(NAMED)),--variants "$(VARIANTS)") $(if $(filter SEEDS,$(NAMED)),--seeds "$(SEEDS)")
COMPARE = $(KDLIB) compare "$(RECIPE)" "$(FOLDS)" $(CHOSEN_OPTIONS) $(call option,ENSEMBLES,--ensembles)
FLOW = $(SNAKEMAKE) --config recipe="$(RECIPE)" until="$(UNTIL)" ensembles="$(ENSEMBLES)"

UP_TO_DATE = echo "Everything is up to date: executed notebooks, tables and figures are in the recipe's folder below outputs/."

demo: $(READY)
	@$(FLOW) folds="$(HELD_OUT)," $(CHOSEN)
	@$(UP_TO_DATE)

folds: $(READY)
	@$(FLOW) folds="$(FOLDS)," $(CHOSEN)
	@$(if $(UNTIL),$(UP_TO_DATE),$(COMPARE))

folds-for: $(READY)
	@$(KDLIB) folds-for "$(RECIPE)"

dry-run: $(READY)
	@$(if $(PROFILE),$(ON_CLUSTER),$(FLOW)) folds="$(FOLDS)," $(CHOSEN) --quiet host --dry-run

# what it would take: runs, hours and bytes by stage; PROBE=1 measures steps that were never taken here
cost: $(READY)
	@$(KDLIB) cost "$(RECIPE)" "$(COMPARED)" $(CHOSEN_OPTIONS) $(call option,CORES,--cores) $(if $(PROBE),--probe)

# on a Slurm cluster; the same command again continues
ON_CLUSTER = $(BIN)/snakemake --profile profiles/$(or $(PROFILE),slurm) $(if $(UNTIL),--until $(UNTIL)) \
  --config recipe="$(RECIPE)" until="$(UNTIL)" ensembles="$(ENSEMBLES)"
cluster: $(READY)
	@$(ON_CLUSTER) folds="$(FOLDS)," $(CHOSEN)
	@$(if $(UNTIL),$(UP_TO_DATE),$(COMPARE))

report: $(READY)
	@$(FLOW) folds="$(FOLDS)," $(CHOSEN) --report outputs/report.html

COMPARED = $(if $(filter file default,$(origin FOLDS)),$(HELD_OUT),$(FOLDS))
compare: $(READY)
	@$(FLOW) folds="$(COMPARED)," variants="$(VARIANTS)" seeds="$(SEEDS)"
	@$(if $(UNTIL),$(UP_TO_DATE),$(KDLIB) compare "$(RECIPE)" "$(COMPARED)" --variants "$(VARIANTS)" --seeds "$(SEEDS)" \
	  --ensembles "$(ENSEMBLES)")

# its own folds, or FOLDS=A,B; the cost is printed first, and a run beyond BUDGET_H hours refused
ABLATION = $(if $(filter file,$(origin RECIPE)),params/ablations/$(or $(SET),temperature).yaml,$(RECIPE))
OWN_FOLDS = $(if $(filter file default,$(origin FOLDS)),,$(FOLDS))
ablations: $(READY)
	@$(KDLIB) ablations "$(ABLATION)" $(OWN_FOLDS) --plan $(call option,BUDGET_H,--budget)
	@$(SNAKEMAKE) ablations --config recipe="$(ABLATION)" folds="$(OWN_FOLDS)$(if $(OWN_FOLDS),$(comma))"
	@$(KDLIB) ablations "$(ABLATION)" $(OWN_FOLDS)

# the same command again continues, also in a second terminal beside the first
tune: $(READY)
	@$(KDLIB) tune "$(RECIPE)" "$(HELD_OUT)" $(call option,VARIANT,--variant) $(call option,RUNS,--runs)

# of FOLDS, by default of all that have scores; or of other people's results: SYSTEMS="hard=a.json kd=b.json,c.json"
figures: $(READY)
	@$(KDLIB) figures "$(RECIPE)" $(OWN_FOLDS) $(call option,CLASS,--document) $(call option,OUT,--out) \
	  $(if $(SYSTEMS),--systems $(SYSTEMS))

power: $(READY)
	@$(KDLIB) power $(call option,OF_FOLDS,--folds) $(call option,OF_SEEDS,--seeds) $(call option,UTTERANCES,--utterances) \
	  $(call option,PAIRS,--pairs) $(if $(filter file,$(origin RECIPE)),,--recipe "$(RECIPE)") $(call option,DECODER,--decoder)

collapse: $(READY)
	@$(SNAKEMAKE) study --config recipe="$(if $(filter file,$(origin RECIPE)),params/ablations/collapse.yaml,$(RECIPE))" \
	  folds="$(COMPARED)," study=1 until="$(UNTIL)"

verdict: $(READY)
	@$(KDLIB) verdict $(SYSTEMS) $(call option,DECODER,--decoder) $(call option,MEASURE,--measure) \
	  $(call option,AGAINST,--against) $(call option,REFERENCES,--references) $(call option,NORMALISER,--normaliser) \
	  $(call option,COLUMNS,--columns) $(call option,UNIT,--unit)

evaluate: $(READY)
	@$(KDLIB) evaluate "$(CHECKPOINT)" "$(MANIFEST)" $(call option,TOKENIZER,--tokenizer) \
	  $(call option,MAX_DECODE_LEN,--max-decode-len) $(call option,DATA_FOLDER,--data-folder) \
	  $(call option,CALIBRATION,--calibration) \
	  $(call option,CALIBRATE_ON,--calibrate-on) $(call option,LM,--lm) $(call option,LM_WEIGHT,--lm-weight) $(call option,DEVICE,--device)

# teachers by speakers, from a folder of result files: teacher_M04/wer_M08.txt
matrix: $(READY)
	@$(KDLIB) matrix "$(RESULTS)" $(call option,MEASURE,--measure)

# logits of other code, before they are used
audit: $(READY)
	@$(KDLIB) audit "$(LOGITS)" $(call option,MANIFEST,--manifest) $(call option,TOKENIZER,--tokenizer) \
	  $(call option,FOLD_SET,--folds)

examine: $(READY)
	@$(KDLIB) examine "$(EVAL)" $(call option,TOKENIZER,--tokenizer) $(call option,DECODER,--decoder) \
	  $(call option,REFERENCES,--references) $(call option,COLUMNS,--columns)

export: $(READY)
	@$(KDLIB) export "$(CHECKPOINT)" "$(NEMO)"

test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# The long form of tests/faults: twenty kills.
faults: $(READY)
	KILLS=20 $(BIN)/python -m pytest -q -s tests/faults tests/test_damage.py

bench: $(READY)
	@failed=; for script in $(filter-out benchmarks/report.py benchmarks/page.py,$(wildcard benchmarks/*.py)); do \
	  PYTHONPATH="tests:$(PYTHONPATH)" $(BIN)/python $$script || failed="$$failed $$script"; \
	done; \
	$(BIN)/python benchmarks/page.py || failed="$$failed benchmarks/page.py"; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

unchanged: $(READY)
	@PYTHONPATH="tests:$(PYTHONPATH)" $(BIN)/python -m unchanged outputs/unchanged $(call option,AGAINST,--against)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify notebooks/*.ipynb

lab: $(READY)
	$(BIN)/jupyter lab notebooks

SHIP = $(if $(filter file,$(origin RECIPE)),params/shipped.yaml,$(RECIPE))
pretrained: $(READY)
	$(KDLIB) pretrained "$(SHIP)" --ship

parent: $(READY)
	$(KDLIB) base-model "$(SHIP)" --ship

# Every version of every package, with no index address.
lock: $(READY)
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --no-emit-index-url --no-header \
	  --no-annotate pyproject.toml -o requirements.lock

# The first Python that runs and is supported: some shims are there and do not run. `uv python find` knows those of uv.
SUPPORTED = -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))'
PYTHON ?= $(shell for name in python3.11 python3.12 python3 "$$(uv python find '>=3.11,<3.13')"; do \
  "$$name" $(SUPPORTED) && { command -v "$$name"; break; }; done 2>/dev/null)
FOUND = $$($(or $(PYTHON),python3) --version 2>/dev/null || echo none)

setup: $(READY)

# An environment with the locked versions is used as it is, also where it is a link to another clone's.
$(READY):
	@test -x $(BIN)/python || $(or $(PYTHON),false) $(SUPPORTED) || { \
	  echo "kdlib needs Python 3.11 or 3.12, found $(FOUND). This brings one, without root: uv python install 3.12" \
	    "(uv itself: pip install uv). Or name yours: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python $(SUPPORTED) || { echo "kdlib needs Python 3.11 or 3.12, but .venv has $$($(BIN)/python --version):" \
	  "remove it (rm -r .venv), and run the same command again"; exit 1; }
	@if $(BIN)/uv pip install --python $(BIN)/python --no-deps --offline --dry-run -r requirements.lock 2>&1 \
	  | grep -q "Would make no changes" && $(BIN)/uv pip show --python $(BIN)/python --quiet kdlib 2>&1; \
	then echo ".venv has the versions of requirements.lock: nothing is installed"; \
	  test ! -L .venv || echo "outside of make, another clone's .venv needs PYTHONPATH=$(CURDIR)"; \
	else $(MAKE) --no-print-directory install; fi
	@touch $(READY)

install:
	@rm -f .venv/.ready*
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^uv==' requirements.lock)"
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --compile-bytecode -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
