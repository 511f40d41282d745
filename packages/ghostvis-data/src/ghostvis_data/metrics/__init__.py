"""Official scores, one file per benchmark family; each reproduces the figures of the benchmark's own code.

vqa (VQAv2, TextVQA), documents (ChartQA relaxed accuracy, ANLS), captions (BLEU, ROUGE-L, CIDEr-D) with ptb (the
tokeniser they assume), multiple_choice (MMMU, MMMU-Pro), numbers (GSM8K), code (HumanEval), core (DCLM's CORE). All are
plain functions of strings; prompts and data live in `ghostvis_data.tasks`.
"""
