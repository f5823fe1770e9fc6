"""What models write besides captions: the patterns of the gate (``prep/captions/quality.py``), and reasoning.

Patterns are looked for in all of an answer, except where they say "^", and never in what is quoted: words that stand in
the picture are not the model's own.
"""

from __future__ import annotations

import re

# reasoning that is closed: <think> of DeepSeek, Qwen and others, [THINK] of Magistral, U+25C1 of Kimi
_REASONING = r"think|thinking|thought|thoughts|reasoning|reason|reflection|analysis|scratchpad|seed:think"
OPENED = rf"<(?:{_REASONING})(?:\s[^<>]*)?>|<\|(?:begin_of_thought|think)\|>|\[THINK\]|\u25c1think\u25b7"
CLOSED = rf"</(?:{_REASONING})\s*>|<\|(?:end_of_thought|/think)\|>|\[/THINK\]|\u25c1/think\u25b7"
_BLOCK = re.compile(rf"(?:{OPENED})(?:(?!{OPENED}|{CLOSED}).)*(?:{CLOSED})", re.IGNORECASE | re.DOTALL)
# channels of gpt-oss (https://cookbook.openai.com/articles/openai-harmony), also where a server took its tokens away
_CHANNELS = re.compile(
    r"^\s*(?:<\|start\|>\s*assistant\s*)?<\|channel\|>(?:\s*final\b|(?:(?!<\|channel\|>\s*final\b).)*"
    r"<\|channel\|>\s*final\b)(?:\s*<\|constrain\|>)?[^<]{0,40}<\|message\|>"
    r"|^\s*<\|channel\|>(?:\s*final\b|(?:(?!<\|channel\|>\s*final\b).)*<\|channel\|>\s*final\b)"
    r"|^\s*analysis(?=[A-Z]|\s).{0,100000}?assistant\s?final\s?",
    re.DOTALL,
)
_CHANNEL_END = re.compile(r"\s*<\|(?:return|end)\|>\s*$")
UNCLOSED = re.compile(
    rf"{OPENED}|{CLOSED}|<\|channel\|>|<channel\|>|^\s*analysis(?=[A-Z])"
    r"|\bthe user (?:wants|wanted|asks|asked|is asking|has asked|requests|requested|needs|would like)\b"
    r"|\bi(?: need|'ll need| have| should| must)(?: to)? (?:describe|write|produce|make sure|avoid|keep|focus|mention"
    r"|start|begin|include|count)\b"
    r"|\blet(?:'s| me| us) (?:start|begin|think|count|check|describe|analy[sz]e|break|look|see|draft|write|re-?read)\b"
    r"|(?:^|[.!?…]\s+)(?:wait|hmm+|(?:okay|ok),? so)\s?[,.…!—]"
    r"|\b(?:here is|here's) my (?:thought process|reasoning|response)\b",
    re.IGNORECASE,
)

_SPEAKER = r"^\s*(?:assistant|user|model|system|human|ai|bot)\s*(?:[:\n]|$)"
TOKENS = re.compile(
    r"<[|\uff5c][^<>|\uff5c]{1,60}[|\uff5c]?>|<[A-Za-z_]{1,30}\|>"  # <|im_end|>, DeepSeek's full-width bars
    r"|</?(?:start|end)_of_\w+>|</?(?:s|bos|eos|pad|unk|mask|sep|cls|image|img|im_\w+|video|audio|box|ref|quad|point)>"
    r"|<(?:image|img|unused|loc|seg|extra_id)[_-]?\w*>|<0x[0-9A-Fa-f]{2}>"
    r"|\[/?(?:inst|img|image|audio|video|pad|mask|eos|bos|sep|cls|unk|system_prompt|available_tools|tool_\w+)"
    r"(?:[-_ :]?\d+)?\]"
    r"|<</?sys>>|\{\{|\}\}|"
    + _SPEAKER + r"|(?:[.!?]|\n)\s*(?:assistant|user|human)\s*:",
    re.IGNORECASE,
)  # fmt: skip
CODE = re.compile(r"```|~~~|^\s*(?:import \w+|def \w+\(|<\?xml|<!DOCTYPE)", re.IGNORECASE)
JSON = re.compile(
    r"^\s*[\[{]\s*[\"'{\[]|^\s*\{.*\}\s*$|[{\[]\s*\"[^\"]{1,60}\"\s*:\s|\"[^\"]{1,60}\"\s*:\s*[\"{\[]"
    r"|^\s*\"?(?:caption|description|text)\"\s*:|^\s*(?:caption|description)\s*=",
    re.IGNORECASE | re.DOTALL,
)
_LABELS = (
    r"(?:(?:main |primary |key |overall |physical |dominant |camera )?(?:subjects?|people|person|persons|appearance"
    r"|attributes|pose|posture|gaze|expression|clothing|attire|outfit|accessories|objects?|props|composition|framing"
    r"|perspective|angle|lighting|light|colou?rs?|colou?r palette|palette|background|foreground|setting|scene"
    r"|environment|mood|atmosphere|style|texture|materials?|details|title|summary|overview|medium|technique))"
)
MARKDOWN = re.compile(
    r"(?:^|\n)\s*#{1,6}\s+\w|\s#{2,6}\s+\w|\*\*\S|\S\*\*|(?<!\w)__\w[^_]*__(?!\w)|(?<![\w*])\*\w[^*\n]{0,80}\*(?![\w*])"
    r"|(?:^|\n)\s*[-*•‣◦●▪–]\s+\w|[.:;!?]\s[*•‣◦●▪]\s+\w|(?:[.:;!?]\s[-–]\s\w.{1,600}?){2}"  # bullets
    r"|(?:^|\n)\s*\(?1[.)]\s(?=[^\n]*(?:\n|\s)\s*\(?2[.)]\s)|(?:[.:;]\s)\(?1[.)]\s+[A-Z].{0,600}[.;:]\s\(?2[.)]\s+[A-Z]"
    r"|!?\[[^\]\n]{1,80}\]\([^)\s]{1,200}\)|\|\s*:?-{3,}|(?:^|\n)\s*(?:-{3,}|={3,}|\*{3,}|_{3,})\s*(?:\n|$)"
    r"|(?:^|\n)\s*>\s+\w|\\(?:boxed|text|textbf|n)\b|\$\\"
    r"|(?:^|\n\s*\n)\s*[A-Z][\w' ,&/-]{0,50}(?::\s*\n|\n\s*\n)"  # a heading without marks: a short line of its own
    rf"|(?:^|\n)\s*{_LABELS}\s*:\s.{{1,800}}?\n\s*{_LABELS}\s*:\s",
    re.IGNORECASE | re.DOTALL,
)
MARKUP = re.compile(r"</?[A-Za-z][A-Za-z0-9_:-]{0,30}(?:\s[^<>]{0,200})?/?>|&(?:amp|lt|gt|quot|nbsp|#\d{2,5});")
WORD_COUNT = re.compile(
    r"\bword[- ]?count\b|\b(?:total|number of) words\b|\bwords?\s*[:=]\s*\d{2,}"
    r"|[(\[]\s*[^()\[\]]{0,30}\b\d{2,4} words\b"
    r"|^\s*\d{2,4} words\b|\b\d{2,4} words\W*$|\bin (?:exactly |about |around |under |roughly )?\d{2,4} words\b"
    r"|\b(?:description|caption|paragraph|text|response|answer) (?:is|has|contains|consists of|runs to|comes to) "
    r"(?:exactly |about |around |approximately |roughly )?\d{2,4} words\b",
    re.IGNORECASE,
)

_PICTURE = r"(?:image|picture|photo|photograph|attachment|file|visual)s?"
_SEE = r"(?:see|view|access|open|find|detect|receive|display|process|analy[sz]e|load|read|look at)"
_NOT = (
    r"(?:do not|don't|did not|didn't|cannot|can't|can not|could not|couldn't|am unable to|'m unable to|am not able to)"
)
REFUSAL = re.compile(
    r"^(?:i(?:'m| am) (?:unable|not able)|i (?:cannot|can't|can not|won't|will not)|(?:so )?sorry\b"
    r"|unfortunately\b|my apologies)"
    r"|\bi(?:'m| am)(?: \w+)? (?:sorry|afraid)\b|\bi(?: do)? apologi[sz]e\b|\bmy (?:sincere )?apologies\b"
    r"|\bas an? (?:\w+[ -])?(?:ai|(?:large )?language model|vision model)\b(?! art)"
    r"|\bi(?:'m| am) (?:just |only )?(?:an? )?(?:\w+ )?(?:ai|language model|text-based)\b"
    r"|\bi(?:'m| am) (?:unable|not able|not allowed|not permitted|not comfortable)\b"
    r"|\bi (?:cannot|can't|can not|won't|will not|am not going to)(?: \w+)? (?:provide|describe|assist|help|identify"
    r"|comply"
    r"|fulfill?|see|view|process|create|generate|write|answer|engage|continue|discuss|complete|caption|make out"
    r"|do (?:this|that))\b"
    r"|\bi (?:must|have to|need to) decline\b|\bi(?:'m| am) not (?:seeing|able)\b"
    rf"|\bi {_NOT}(?: \w+)? {_SEE}\b"
    r"|\bi (?:do not|don't) (?:actually |currently )?have (?:the ability|access|any image|an image|the image|a way)\b"
    rf"|\bi (?:see|have|received) no {_PICTURE}\b|^(?:there (?:is|was)|i see) no {_PICTURE}\b"
    rf"|\bthere (?:is|was|seems to be|appears to be) no {_PICTURE}\b(?=\s*(?:attached|provided|uploaded|included"
    rf"|here|in (?:your|this|the|our) (?:message|chat|conversation"
    rf"|prompt|request)|for me|to (?:describe|analy[sz]e)))"
    rf"|\bno {_PICTURE} (?:was|were|is|are|has been|have been|seems? to (?:be|have been)|appears? to (?:be|have been)) "
    r"(?:attached|provided|uploaded|shared|included|supplied|sent|given|received)\b"
    rf"|\b{_PICTURE} (?:did not|didn't|failed to|could not|couldn't) (?:load|come through|upload|attach|be (?:loaded"
    rf"|opened))\b"
    rf"|\bplease (?:\w+ )?(?:(?:upload|attach|re-?upload)\b|(?:provide|share|send|paste"
    rf"|supply) (?:\w+ ){{0,3}}{_PICTURE}\b)"
    r"|\byou(?:'ve| have)?(?: \w+)? (?:forgotten|forgot)\b|\byou(?: have not| haven't| did not| didn't)(?: \w+)? "
    r"(?:attach|upload|provid|shar|includ|sen[dt])|\b(?:could|can|would) you (?:please )?(?:upload|share|provide"
    r"|send|attach)\b"
    rf"|\bno {_PICTURE} (?:detected|found)\b"
    r"|\bagainst my (?:guidelines|policy|policies|programming|principles)\b|\bcontent polic(?:y|ies)\b"
    r"|\b(?:violates?|goes against) (?:\w+ )?(?:guidelines|polic(?:y|ies)|terms)\b",
    re.IGNORECASE,
)
# refusals in the languages that models fall into, and "I am an AI model"; looked for in all of the answer
FOREIGN_REFUSAL = re.compile(
    r"\bes tut mir (?:wirklich )?leid\b|\btut mir leid\b|\bentschuldigung\b|\bich (?:kann|darf|möchte"
    r"|werde) (?:\w+ ){0,5}"
    r"(?:nicht|keine?n?)\b|\bals (?:ki|sprachmodell|künstliche)|\bich sehe kein|\bleider (?:kann|ist es mir|darf)\b"
    r"|\bje suis (?:vraiment )?désolée?\b|^désolée?\b|\bje ne (?:peux|vois|suis pas en mesure|puis)\b"
    r"|\ben tant qu'(?:ia|intelligence"
    r"|assistant|modèle)|\bmalheureusement, je\b"
    r"|\blo siento\b|\bno puedo\b|\blo lamento\b|\bno veo ninguna\b|\bcomo (?:modelo de|asistente (?:de|virtual)"
    r"|inteligencia)\b"
    r"|\bmi dispiace\b|\bnon posso\b|\bnon sono in grado\b|\bnon vedo alcuna\b|\bcome modello ling"
    r"|\bdesculp[ea]\b|\bsinto muito\b|\bnão (?:posso|consigo|vejo)\b|\blamento, mas\b|\bcomo (?:um )?modelo de ling"
    r"|\bhet spijt me\b|\bik kan (?:\w+ ){0,5}(?:niet|geen)\b|\bsorry, maar ik\b|\bhelaas kan ik\b"
    r"|\bprzepraszam\b|\bprzykro mi\b|\bnie mogę\b|\bniestety\b|\bomlouvám se\b|\bbohužel\b|\bnemohu\b"
    r"|\btyvärr\b|\bjag kan (?:\w+ ){0,4}inte\b|\bbeklager\b|\bjeg kan (?:\w+ ){0,4}ikke\b|\bvalitettavasti\b"
    r"|\ben voi\b"
    r"|\büzgünüm\b|\bmaalesef\b|\bsajnálom\b|\bnem tudok\b|\bîmi pare rău\b|\bnu pot\b|\bmaaf\b|\bsaya tidak (?:bisa"
    r"|dapat)\b"
    r"|\bxin lỗi\b|\btôi không thể\b|\bλυπάμαι\b|\bδεν μπορώ\b"
    r"|извините|простите|к сожалению|я не могу|не в состоянии|вибачте|на жаль|я не можу"
    r"|(?:^|[.。!！?？\n\"]\s*)(?:很|非常|十分|真的)?(?:抱歉|对不起|對不起)|我无法|我無法|我不能|作为(?:一个|一名)?(?:ai|人工智能|语言模型)"
    r"|(?:^|[.。!！?？\n\"]\s*)(?:大変)?(?:申し訳|すみません|ごめんなさい)|画像を(?:説明|確認|表示)することはできません"
    r"|(?:^|[.。!！?？\n\"]\s*)(?:죄송|미안하지만)|이미지를 (?:설명|확인)할 수 없"
    r"|آسف|عذر[اًا]|أعتذر|لا أستطيع|لا يمكنني|מצטער|איני יכול|אני לא יכול|क्षमा करें|माफ़ करें|खेद है|ขออภัย|ขอโทษ"
    r"|ไม่สามารถ",
    re.IGNORECASE,
)

_TEXT = r"(?:description|caption|paragraph|breakdown|summary|alt[- ]text|"
_TEXT += r"(?:version|revision|response|answer|output)(?=s?\W*:))"
PREAMBLE = re.compile(
    r"^\W*(?:sure|certainly|of course|absolutely|okay|ok|great|alright|understood|got it|no problem|with pleasure|yes"
    r"|gladly|happy to help)(?:\s*[,.!:]|\s+[–—-]\s|\s+(?:thing|here)\b)"
    r"|(?:^|[.!?:\n]\s*)\W{0,3}(?:and |now |so )?here(?:'s| is| are| you go| comes)\b[^.:]{0,80}\b" + _TEXT + r"s?\b"
    r"|^\W*(?:here you go|here it is)\b"
    r"|(?:^|[.!?\n]\s*)(?:below|the following) (?:is|are) (?:\w+ ){0,4}" + _TEXT + r"s?\b"
    r"|(?:^|[.!?\n]\s*)the following (?:paragraph|description|caption)\b"
    r"|^\W*(?:image|photo|picture|figure) ?\d*\s*:\s"
    r"|(?:^|[.!?\n]\s*)\W*(?:(?:image|photo|picture|detailed|final|my|dense|the|one|short|long|revised)[- ]?){0,3}"
    + _TEXT + r"s?(?: (?:of|for) (?:the|this) \w+)?\W*:\W*\s"
    r"|^(?:this is|that is|it is) (?:a|the|my) (?:\w+ ){0,3}" + _TEXT + r"\b"
    rf"|^(?:to describe\b|(?:based on|looking at) (?:the|this|your) (?:\w+ )?{_PICTURE}\b|as requested"
    rf"|(?:as )?per your|following your"
    r"|according to (?:your|the instructions))"
    r"|\bi(?:'ll| will|'d| would)(?: be (?:happy|glad) to)? (?:describe|provide|write|give|create|caption|try)\b"
    r"|\bi(?:'ve| have) (?:described|provided|written|created|included|tried|captured|followed)\b"
    rf"|\b(?:this|the|your|that) {_PICTURE} (?:that )?(?:you(?:'ve| have)?|has been) "
    r"(?:uploaded|provided|sent|shared|submitted)\b"
    rf"|\b(?:the|your) (?:uploaded|provided|supplied|submitted) {_PICTURE}\b",
    re.IGNORECASE,
)  # fmt: skip
CLOSING = re.compile(
    r"\b(?:let me know|would you like|do you want me|do you need|i hope (?:this|that|it|you)|hope (?:this"
    r"|that) helps|feel free"
    r"|is there any(?:thing)? (?:else|other|more|specific|particular)|anything else (?:i|you)|if you(?:'d"
    r"| would)? (?:need|like|want|have)"
    r"(?: me| any| more| further| a| to| anything)|happy to (?:help|assist|provide|adjust|refine)|glad to (?:help"
    r"|assist)"
    r"|can i (?:help|assist)|how (?:can|may) i (?:help|assist)|don't hesitate|(?:thank you|thanks) for (?:sharing"
    r"|providing|your)"
    r"|note that (?:i|(?:this|the|my) (?:description|caption|paragraph))|end of (?:description|caption|response))\b"
    r"|(?:^|[.!?)\n]\s*)[(\[]?(?:please )?(?:note|disclaimer|p\.?s\.|explanation|reasoning|edit|tags|keywords"
    r"|hashtags)\s*:"
    r"|\bthis (?:description|caption|paragraph|response) (?:is|was|has|avoids|adheres|meets|follows|captures|covers"
    r"|focuses"
    r"|provides|aims|should|contains|includes|does)\b"
    r"|(?:^|\s)#[A-Za-z]\w+(?:\s+#[A-Za-z]\w+){2,}",
    re.IGNORECASE,
)
# an instruction of a prompt that the gate does not know word for word
INSTRUCTION = re.compile(
    r"\b(?:write|compose|produce|provide|give|create|generate) (?:me )?(?:one|a|an|the)(?: \w+){0,3} "
    r"(?:paragraph|description|caption)\b|\b(?:describe|caption) (?:this|the) (?:image|picture|photo|photograph)\b"
    r"|\bthe (?:prompt|instructions?|task) (?:says?|asks?|is to|requires?|states?|specif\w+)\b"
    r"|\b(?:avoid|do not use) (?:headings|lists|markdown|preambles?|bullets?)\b",
    re.IGNORECASE,
)
QUOTED = re.compile(
    r"\"[^\"]*\"|„[^„“”\"]*[“”\"]|«[^«»]*»|‹[^‹›]*›|「[^「」]*」|『[^『』]*』|《[^《》]*》"
    r"|(?<![\w'])'(?:[^'\n]|(?<=\w)'(?=\w)){1,200}'(?!\w)"
)


def without_reasoning(text: str) -> str:
    """Return an answer without the reasoning in it, where it is closed; what is opened or closed alone stays."""
    before = None
    while text != before:
        before, text = text, _BLOCK.sub(" ", text)
    rest = _CHANNELS.sub("", text, count=1)
    return _CHANNEL_END.sub("", rest) if rest != text else text
