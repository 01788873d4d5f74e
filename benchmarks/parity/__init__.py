"""Parity: the model against ``transformers`` and against itself, over random tiny configs.

python -m benchmarks.parity                  all cases; writes benchmarks/results/parity.json
python -m benchmarks.parity --seed 17 --kind decode --case "wraps 3, rollback 2"      one of them
"""
