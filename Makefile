# make test: set up and pass the tests.
# make train: set up and run the main job on the embedded default.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
RUN := runs/tiny_v2v_lora-v2v-s0
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: setup test train check docs gpu clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt requirements-lmms.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e ".[tracking,deepspeed,qlora,data,eval,docs,test]"
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

# The site, from what is tracked, with strict links: $(SITE)/index.html.
SITE := build/site
docs: setup
	rm -rf build/docs
	mkdir -p build/docs
	git ls-files -coz --exclude-standard | grep -zv '^tests/' | xargs -0 cp --parents -t build/docs
	$(BIN)/mkdocs build -q -f mkdocs.yml -d $(abspath $(SITE))

# What only an NVIDIA GPU can tell: the tests that need one, and tables of a 7B model with random
# weights. Needs a CUDA build of torch in $(VENV).
GPU_RUN := $(BIN)/python -m eval.throughput --size 7b --train lora --masks causal v2v v2v+merge
gpu: setup
	$(BIN)/python -m pytest -q -m cuda
	$(BIN)/python -m eval.attention_speed --heads 32 --head_size 128 --dense 16384 \
		--lengths 1024 4096 8192 16384 32768 --packed 8192 16384 32768 \
		--out eval/results/attention_gpu.json
	$(GPU_RUN) --images 1 --out eval/results/throughput_gpu_1_image.json
	$(GPU_RUN) --images 10 --out eval/results/throughput_gpu_10_images.json
	$(GPU_RUN) --images 1 6 --tables runs --packing 8192 --out eval/results/throughput_gpu_8k.json
	$(GPU_RUN) --images 1 6 --tables runs --packing 16384 --out eval/results/throughput_gpu_16k.json
	$(BIN)/python -m eval.latency --model random --size 7b --backend flash \
		--out eval/results/latency_gpu.json
	$(BIN)/python -m eval.throughput --size 7b --train full --tables backends --batch 1 \
		--masks causal v2v v2v+merge --images 10 --gradient_checkpointing \
		--out eval/results/throughput_gpu_full.json

clean:
	rm -rf $(VENV) runs data build *.egg-info
