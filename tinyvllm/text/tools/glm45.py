"""GLM-4.5 to 4.7: `<tool_call>name`, then `<arg_key>key</arg_key><arg_value>value</arg_value>` for each argument.

GLM-4.5 and 4.6 put line breaks between the tags, which are read too. https://huggingface.co/zai-org/GLM-4.7-Flash (its
chat template)
"""

from __future__ import annotations

from tinyvllm.text.tools.tagged import TaggedFormat, Tags


class Glm45Format(TaggedFormat):
    marks = ("<arg_key>",)
    tags = Tags(
        key_begin="<arg_key>",
        key_end="</arg_key>",
        value_begin="<arg_value>",
        value_end="</arg_value>",
    )


FORMAT = Glm45Format()
