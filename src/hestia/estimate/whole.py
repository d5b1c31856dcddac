"""stub"""
from typing import Any
from .. import loading, recipes
from ..jobs import plan_model, longest_block
from ..nn import select
from ..options import Options
from .memory import Sizes, passes, stages, Stage
from ..planner import plan as make_plan

def memory(options: Options) -> list[Stage]:
    source = loading.resolve(options.model)
    config = loading.load_config(source)
    model = loading.empty_model(source, config)
    plan = plan_model(options)
    n = sum(p.numel() for p in model.parameters())
    blocks={}
    for name,p in model.named_parameters():
        k=next((x for x in name.split(".") if x.isdigit()),None)
        if k: blocks[k]=blocks.get(k,0)+p.numel()
    sizes = Sizes(parameters=n, trained=n, quantized=plan.quantized_weights, candidates=len(recipes.GRIDS), largest_block=max(blocks.values()), outside=n-sum(blocks.values()), vocabulary=config.vocab_size)
    done = passes(config, plan, options, tokens=longest_block(config, options), batch=options.batch_size or 16, bf16=options.precision != "fp32")
    return stages(sizes, done)
