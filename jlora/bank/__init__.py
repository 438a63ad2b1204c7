"""Many adapters over one base: adapters stacked in slots, and batches whose examples choose one.

    y[k] = x[k] W + s[n] · (x[k] A[n]) B[n]        n = ids[k]; no update where n is -1

```python
bank = jlora.bank.stack([french, sql, poems], slots=8, rank=16)
bank = jlora.bank.put(bank, 3, new)  # another adapter in a slot: nothing recompiles
y = jlora.bank.each(model.apply, base, bank, ids, x)  # x[k] with adapter ids[k]
one = jlora.bank.pick(bank, 1)  # an adapter again
```

The first axis of every leaf of a bank is the slots. So one sharding fits all leaves:
`jax.device_put(bank, NamedSharding(mesh, PartitionSpec("slots")))`.

`jax.grad` of `each` over the bank trains all slots at once; `per_slot` gives each its own optimizer
state. Running N adapters together pays with few tokens each. With many there is nothing to gain:
train one slot after the other, in the memory of one, with `jax.lax.map(step, (bank, state, batch))`
and `bind(base, bank)` in the step.

A bank is for training, evaluation and demonstrations. To serve adapters in production, export them
with `jlora.peft.save`.
"""

from jlora.bank._each import each as each
from jlora.bank._per_slot import per_slot as per_slot
from jlora.bank._slots import Bank as Bank
from jlora.bank._slots import bind as bind
from jlora.bank._slots import pick as pick
from jlora.bank._slots import put as put
from jlora.bank._slots import stack as stack

__all__ = ["Bank", "bind", "each", "per_slot", "pick", "put", "stack"]
