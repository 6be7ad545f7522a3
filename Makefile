# make test: set up and pass the tests.
# make train: set up and run the main job on the embedded default.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
RUN := runs/tiny_v2v_lora-v2v-s0
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: setup test train check clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt requirements-lmms.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e ".[tracking,deepspeed,data,eval,test]"
	$(BIN)/pip install -q --no-deps -r requirements-lmms.txt
	touch $@

test: check
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

# The main job: fine-tune the tiny pretrained LLaVA under v2v, export, reload, audit, ask.
train: setup
	rm -rf $(RUN)
	$(BIN)/fmtrain train tiny_v2v_lora
	$(BIN)/fmtrain export $(RUN) --out $(RUN)/exported
	$(BIN)/fmtrain audit $(RUN)/exported
	$(BIN)/python -m eval.compare --before fmtrain/tiny_llava --after $(RUN)/exported

# Style, format and types.
check: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/basedpyright

clean:
	rm -rf $(VENV) runs data build *.egg-info
