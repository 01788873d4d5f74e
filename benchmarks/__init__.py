"""Benchmarks: kernels as data with one runner, the whole model, the tokenizer; results per device.

python -m benchmarks                  time every operation on this machine's fastest device
python -m benchmarks --device cpu     on the CPU even where there is a GPU
python -m benchmarks --aot            compile for sm_90 and sm_100 instead: registers, memory
python -m benchmarks.drafting MODEL   self-drafting: identity, acceptance, speed
python -m benchmarks.memory           the planner's memory against the allocator, config by config
python -m benchmarks.model train      the whole model against transformers on a CPU
python -m benchmarks.loop             what the training loop and a checkpoint cost
python -m benchmarks.crash            kills, damaged checkpoints and SIGTERM lose no step
python -m benchmarks.parallel         ranks on meshes of two and four against one process
python -m benchmarks.parity           the model against transformers and itself, random configs
python -m benchmarks.tokenizer        training, encoding and round trips of the tokenizer
"""
