# Two commands are enough: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
DATA   ?= data
TINY   ?= runs/tiny
JOBS   ?= 2

.PHONY: demo figures test lint tiny bench bench-gpu clean

$(VENV)/.installed: requirements.txt requirements-extra.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -r requirements-dev.txt
	touch $@

# The main job on CPU, in minutes, with the bundled models: faces by seed; a photo (scikit-image's astronaut) and drawn faces
# are aligned, inverted, edited, given another face's expression, pasted back; then the drawn faces become a data set, on
# which a training starts, is stopped and goes on. Images land in demo/.
SIZE       ?= 128
NAME       ?= face-wpp-$(SIZE)
MODEL      ?= checkpoints/$(NAME).safetensors
CGAN       ?= checkpoints/face-cgan-$(SIZE).safetensors
DEMO       ?= demo
DEMO_EDIT   = --ckpt $(MODEL) --latent $(DEMO)/inverted --perceptual scorer:face-scorer --identity none --device cpu
DEMO_TRAIN := --path $(DEMO)/faces.lmdb --size $(SIZE) --exp_name $(DEMO)/training --batch 8 --n_sample 16 --noise none --r1 0.1 \
              --augment --device cpu --workers 1 --log_every 10

demo: $(VENV)/.installed
	rm -rf $(DEMO)
	$(PY) generate.py --ckpt $(MODEL) --seeds 0-99 --truncation 0.8 --noise none --grid --output_dir $(DEMO)/faces --device cpu
	mv $(DEMO)/faces/grid.png $(DEMO)/1-faces-by-seed.png
	$(PY) generate.py --ckpt $(MODEL) --mix 0-4 10-17 --mix_layers 0-3 --truncation 0.8 --noise none --output_dir $(DEMO) --device cpu
	mv $(DEMO)/mix.png $(DEMO)/2-style-mixing.png
	$(PY) generate.py --ckpt $(MODEL) --seeds 0-5 --truncation 0.8 --noise none --interpolate --frames 20 --video $(DEMO)/3-interpolation.gif \
	  --output_dir $(DEMO) --device cpu
	mkdir -p $(DEMO)/photos
	$(PY) -c "import skimage.data, skimage.io; skimage.io.imsave('$(DEMO)/photos/astronaut.png', skimage.data.astronaut())"
	$(PY) edit_photos.py $(DEMO)/photos --age +20 --output_dir $(DEMO)/edited --device cpu
	cp docs/astronaut.json $(DEMO)/photos/
	$(PY) align_faces.py --photos $(DEMO)/photos --output_dir $(DEMO)/aligned --n_worker 1
	cp $(DEMO)/faces/seed0003.png $(DEMO)/faces/seed0007.png $(DEMO)/faces/seed0012.png $(DEMO)/aligned/aligned/
	$(PY) projector.py --ckpt $(MODEL) --dataset $(DEMO)/aligned/aligned --step 1 --tune 20 --device cpu --output_dir $(DEMO)/inverted
	for a in age gender smile; do $(PY) edit_attribute.py $(DEMO_EDIT) --boundary checkpoints/$(NAME)-$$a.npz --video gif --output_dir $(DEMO)/edits/$$a || exit 1; done
	$(PY) edit_attribute.py $(DEMO_EDIT) --boundary checkpoints/$(NAME)-age.npz --at 3 --distance relative --unit std --output_dir $(DEMO)/edits/older
	$(PY) align_faces.py --paste_back $(DEMO)/edits/older/edited --unedited $(DEMO)/edits/older/unedited --alignment $(DEMO)/aligned/alignment.json --photos $(DEMO)/photos \
	  --output_dir $(DEMO)/pasted
	$(PY) edit_conditional.py --ckpt $(CGAN) --latent $(DEMO)/inverted --set smile=1,eyeglasses=1 --identity none --device cpu --output_dir $(DEMO)/glasses
	$(PY) edit_conditional.py --ckpt $(CGAN) --latent $(DEMO)/inverted --reference $(DEMO)/aligned/aligned/astronaut.png \
	  --start inversion --identity none --device cpu --output_dir $(DEMO)/transfer
	$(PY) prepare_data.py --out $(DEMO)/faces.lmdb --size $(SIZE) --n_worker 2 $(DEMO)/faces
	$(PY) train.py $(DEMO_TRAIN) --init_from $(MODEL) --iter 10 --sample_every 10 --save_every 10
	$(PY) train.py $(DEMO_TRAIN) --resume auto --iter 20 --sample_every 20 --save_every 20
	cp $(DEMO)/training/sample/000020.png $(DEMO)/4-training-sample.png
	cp $(DEMO)/training/similarity/000020.png $(DEMO)/5-attention-maps.png
	@echo
	@echo "$(DEMO)/edited                 the astronaut's photo, 20 years older: edit_photos.py"
	@echo "$(DEMO)/1-faces-by-seed.png    100 faces drawn by the bundled W++ model, truncation 0.8"
	@echo "$(DEMO)/inverted               the astronaut and three drawn faces in W++: by the encoder, the generator tuned to each"
	@echo "$(DEMO)/edits/*/strips         them along age, gender and smile, with what the scorer sees"
	@echo "$(DEMO)/pasted                 the astronaut's edited face in the photo"
	@echo "$(DEMO)/glasses                the same faces with a smile and glasses by the conditional generator"
	@echo "$(DEMO)/transfer               the astronaut's expression on the other faces"
	@echo "$(DEMO)/4-training-sample.png  after 20 steps of training on drawn faces, stopped and resumed at step 10"

# The figures of docs/figures from the bundled models, and the curve of FID from committed results. Another model:
# make figures NAME=mine; a W generator that is not in checkpoints/: FIGURE_FLAGS="--w_ckpt FILE"
CURVE        ?= W++=docs/ablation-32/wpp.jsonl W=docs/ablation-32/w.jsonl "8 mappings=docs/ablation-32/independent.jsonl"
FIGURE_FLAGS ?=
figures: $(VENV)/.installed
	$(PY) tools/make_figures.py --ckpt $(MODEL) --device cpu $(FIGURE_FLAGS)
	$(PY) metrics/report.py $(CURVE) --png docs/figures/fid-curve.png

test: $(VENV)/.installed
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# The whole pipeline, tiny, on real faces: faces -> LMDB -> W++ training, continued from its checkpoint -> W training -> samples
tiny: $(VENV)/.installed
	$(PY) prepare_data.py --out $(TINY)/faces.lmdb --size 32 --n_worker 2 $(DATA)/faces
	$(PY) train.py --path $(TINY)/faces.lmdb --size 32 --exp_name $(TINY)/wpp --channel_max 32 --n_mlp 4 --batch 16 \
	  --r1 0.1 --augment --iter 100 --sample_every 100 --save_every 100 --log_every 50 --n_sample 36 --resume auto
	$(PY) train.py --path $(TINY)/faces.lmdb --size 32 --exp_name $(TINY)/wpp --channel_max 32 --n_mlp 4 --batch 16 \
	  --r1 0.1 --augment --iter 400 --sample_every 200 --save_every 200 --log_every 50 --n_sample 36 --resume auto
	$(PY) train.py --path $(TINY)/faces.lmdb --size 32 --exp_name $(TINY)/w --channel_max 32 --n_mlp 4 --batch 16 --w_space \
	  --r1 0.1 --augment --iter 400 --sample_every 200 --save_every 200 --log_every 50 --n_sample 36 --resume auto
	$(PY) generate.py --ckpt $(TINY)/wpp/checkpoint/000400.pt --seeds 0-35 --grid --output_dir $(TINY)/generated
	@echo "samples: $(TINY)/wpp/sample, $(TINY)/w/sample; pictures by seed: $(TINY)/generated"
	@echo "6,400 images are enough for colours and blobs; silhouettes come at 16,000, faces at 100,000 (docs/results.md)"

bench: $(VENV)/.installed
	$(PY) benchmarks/bench_model.py

# The whole table of a GPU in under 8 minutes, on a machine with torch, Triton, NumPy, Pillow, tqdm and safetensors alone;
# each line ends in one line of JSON. Peers beside: make bench-gpu GPU_PEERS="--peer_nvidia stylegan3"
GPU_PYTHON ?= $(PYTHON)
GPU        ?= cuda
GPU_PEERS  ?=
bench-gpu:
	$(GPU_PYTHON) benchmarks/bench_op.py --device $(GPU) --budget 90
	$(GPU_PYTHON) benchmarks/bench_train.py --device $(GPU) --sizes 256 --batches 8 16 --precision bf16 fp32 --original --budget 100 \
	  $(GPU_PEERS)
	$(GPU_PYTHON) benchmarks/bench_train.py --device $(GPU) --sizes 64 128 1024 --batches 4 32 --precision bf16 --repeats 3 --budget 50
	$(GPU_PYTHON) benchmarks/bench_generate.py --device $(GPU) --sizes 256 1024 --batches 1 16 --precision bf16 fp32 --original --drawn 32 --budget 45 \
	  $(GPU_PEERS)
	$(GPU_PYTHON) benchmarks/bench_invert.py --device $(GPU) --size 256 --channel_max 512 --steps 40 --shorter 30 --perceptual random
	$(GPU_PYTHON) benchmarks/bench_edit.py --device $(GPU) --parts sweep --frames 32 --repeats 2

clean:
	rm -rf demo runs .pytest_cache .ruff_cache
