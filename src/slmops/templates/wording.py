"""The words of the support-desk generator: what customers say, as data.

Templates are plain text with two marks: `[a|b|c]` is one of the choices (they nest; an empty choice is allowed) and
`{slot}` is filled by the generator. `{item}` is a thing with its determiner or "it"; `{item}` is that or an order
number; `{thing}` is the bare word. `asks` follow "can you …", `wants` follow "I would like to …", `says` are whole
sentences, many of them without any word that names the function.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Function:
    """One function of the desk: its name, its share, its arguments in order, and how people ask for it."""

    name: str
    weight: float
    arguments: tuple[str, ...]
    asks: tuple[str, ...]
    wants: tuple[str, ...]
    says: tuple[str, ...]


VALUES: dict[str, dict[str, tuple[str, ...]]] = {
    "item": {
        "blender": ("blender", "blender", "smoothie maker", "mixer"),
        "kettle": ("kettle", "kettle", "water boiler", "tea kettle"),
        "toaster": ("toaster", "toaster", "toast machine"),
        "lamp": ("lamp", "lamp", "light", "reading lamp"),
        "desk": ("desk", "desk", "standing desk", "work table"),
        "chair": ("chair", "chair", "office chair", "swivel chair"),
        "headphones": ("headphones", "headphones", "headset", "earphones"),
        "monitor": ("monitor", "monitor", "screen", "display"),
        "jacket": ("jacket", "jacket", "rain coat", "winter coat"),
        "boots": ("boots", "boots", "hiking boots", "walking shoes"),
    },
    "day": {
        "monday": ("monday", "monday", "mon", "next monday", "this mon"),
        "tuesday": ("tuesday", "tuesday", "tue", "next tuesday", "this tues"),
        "wednesday": ("wednesday", "wednesday", "wed", "next wed", "this wednesday"),
        "thursday": ("thursday", "thursday", "thu", "this thurs", "next thursday"),
        "friday": ("friday", "friday", "fri", "this friday", "next fri"),
        "saturday": ("saturday", "saturday", "sat", "this saturday", "next sat"),
        "tomorrow": ("tomorrow", "tomorrow", "tmrw", "the day after today"),
    },
    "to": {
        "work": ("my office", "my workplace", "where i work", "the office", "my company"),
        "neighbour": ("my neighbour", "next door", "the people next door", "the flat across the hall"),
        "locker": ("a parcel locker", "the locker at the station", "a pickup locker", "the parcel box"),
        "shop": ("your shop", "the store in town", "one of your stores", "the shop so i collect it"),
    },
    "reason": {
        "broken": (
            "it is broken",
            "it does not switch on",
            "it fell apart",
            "it has a crack",
            "it stopped working",
            "it arrived in pieces",
            "something snapped off",
        ),
        "size": (
            "it is too small",
            "it is too big",
            "it does not fit",
            "the size is wrong",
            "it is far too large for me",
            "i picked the wrong size",
        ),
        "colour": (
            "the colour is wrong",
            "it is not the colour i picked",
            "it looks a different shade",
            "i wanted another colour",
            "the colour looks awful",
        ),
        "unwanted": (
            "i changed my mind",
            "i do not need it any more",
            "it was an impulse buy",
            "i already own one",
            "i no longer want it",
            "somebody gave me one",
        ),
    },
    "fault": {
        "broken": (
            "it is broken",
            "it does not switch on",
            "it came with a crack",
            "it died after an hour",
            "it arrived in pieces",
            "it makes smoke",
            "it stopped working",
        ),
        "incomplete": (
            "a part is missing",
            "there are no screws in the box",
            "half of it was not in the box",
            "the box was almost empty",
            "it came without the cable",
            "pieces are missing",
        ),
        "wrong": (
            "it is not what i ordered",
            "you sent the wrong one",
            "somebody mixed up the boxes",
            "this is a different model",
            "it is the wrong model",
        ),
    },
    "colour": {
        "black": ("black", "all black", "dark black"),
        "white": ("white", "plain white", "snow white"),
        "red": ("red", "dark red", "cherry"),
        "blue": ("blue", "navy", "sky blue"),
        "green": ("green", "olive", "forest green"),
    },
    "by": {
        "email": ("by email", "by e-mail", "to my inbox", "as an email", "to my mail address"),
        "post": ("by post", "on paper", "in an envelope", "as a letter", "as a printed copy"),
        "app": ("in the app", "on my phone in your app", "inside the app", "through the app"),
    },
    "time": {
        "morning": ("in the morning", "before noon", "early", "before lunch", "around 9 am"),
        "afternoon": ("in the afternoon", "after lunch", "around 3 pm", "mid afternoon"),
        "evening": ("in the evening", "after work", "around 7 pm", "after dinner", "late in the day"),
    },
    "field": {
        "password": ("password", "login password", "pass word", "secret for the login"),
        "email": ("email address", "email", "mail address", "address for the newsletters"),
        "phone": ("phone number", "mobile number", "number you call me on", "telephone number"),
        "surname": ("last name", "surname", "family name", "name, i got married"),
    },
}

FUNCTIONS: tuple[Function, ...] = (
    Function(
        "track",
        1.1,
        ("item",),
        (
            "[tell me|check|find out|see] where {item} is",
            "[check|look up] the status of {item}",
            "track {item}",
            "give me an update on {item}",
            "tell me [when|on what day] {item} [arrives|gets here|comes]",
        ),
        (
            "know where {item} is",
            "track {item}",
            "know how far along {item} is",
            "hear when {item} [gets here|arrives|turns up]",
        ),
        (
            "where [is|the heck is|has the van left] {item}[|?]",
            "[still no sign of|i am still waiting for] {item}[|, any news?]",
            "has {item} [left the warehouse|been sent|shipped] [yet|already]?",
            "when [will i see|do i get|can i expect] {item}?",
            "{item} should have been here [days ago|by now], what is going on",
            "any idea how long {item} [will take|is going to be]?",
            "the link says nothing about {item}",
        ),
    ),
    Function(
        "cancel",
        1.1,
        ("item",),
        (
            "cancel {item}",
            "stop {item} [before it ships|from going out]",
            "take {item} [off|out of] my order list",
            "call off {item}",
            "make sure {item} is never sent",
        ),
        (
            "cancel {item}",
            "call off {item}",
            "drop {item} before it leaves your warehouse",
            "back out of buying {item}",
            "pull {item} from what you are packing",
        ),
        (
            "please do not ship {item}[|, i found it cheaper| at all]",
            "i ordered {item} by [mistake|accident], it must not go out",
            "scrap {item}, it has not shipped yet",
            "forget {item}, i [bought it elsewhere|no longer want it sent]",
            "[hold on|wait], {item} was never meant to be bought, undo that before it leaves",
            "cancellation of {item}",
        ),
    ),
    Function(
        "reschedule",
        1.2,
        ("item", "day"),
        (
            "[bring|deliver|drop off] {item} on {day} instead",
            "[move|shift|push] {item} to {day}",
            "[change|switch] the [delivery|day] of {item} to {day}",
            "come with {item} {day} rather than the date you gave me",
            "[hold|keep] {item} back until {day}",
        ),
        (
            "get {item} on {day} instead",
            "[move|shift] the delivery of {item} to {day}",
            "have {item} brought {day}",
            "pick {day} as the new date for {item}",
        ),
        (
            "{day} [suits|works for] me better for {item}",
            "nobody is home on the planned day, {item} can come {day}",
            "i can only [sign for|receive] {item} {day}",
            "{item} [should|must] come {day}, not when you planned",
            "new date for {item}: {day}",
            "would {day} be possible for {item}?",
        ),
    ),
    Function(
        "redirect",
        1.0,
        ("item", "to"),
        (
            "[send|ship|deliver] {item} to {to}",
            "drop {item} at {to}",
            "leave {item} with {to}",
            "change the address of {item} to {to}",
            "bring {item} to {to} and not to my house",
        ),
        (
            "have {item} go to {to}",
            "get {item} sent to {to}",
            "use {to} as the place for {item}",
            "pick {item} up from {to}",
        ),
        (
            "my door is hard to find, {item} is better off at {to}",
            "{item} should go to {to}, not home",
            "nobody opens at my place, so {to} for {item}",
            "new place for {item}: {to}",
            "could {to} take {item} in?",
            "i will not be home all week, {to} is the right place for {item}",
        ),
    ),
    Function(
        "return",
        1.2,
        ("item", "reason"),
        (
            "take {item} back[,| because|:] {reason}",
            "send me a return label for {item}[,| because|:] {reason}",
            "arrange the return of {item}, {reason}",
            "collect {item} again, {reason}",
        ),
        (
            "[return|send back|give back] {item}[,| because| since|:] {reason}",
            "bring {item} back, {reason}",
            "hand {item} in again as {reason}",
            "get rid of {item} and have my money, {reason}",
        ),
        (
            "{item} [goes|is going] back to you, {reason}",
            "how do [returns|i send things back] work? {item}, {reason}",
            "{reason}, so i do not keep {item}",
            "i am not keeping {item}, {reason}",
            "{item} is not for me: {reason}. where do i post it?",
            "{reason}. you can have {item} back",
        ),
    ),
    Function(
        "replace",
        1.1,
        ("item", "fault"),
        (
            "[swap|exchange|replace] {item}[,| because|:] {fault}",
            "send [another one|a new one] for {item}, {fault}",
            "ship me a working copy of {item}, {fault}",
            "give me a fresh one in place of {item} since {fault}",
        ),
        (
            "[swap|exchange] {item}[,| because| since|:] {fault}",
            "have a new one for {item}, {fault}",
            "get {item} again in good order, {fault}",
            "trade {item} for one that is right, {fault}",
        ),
        (
            "{fault}, i need another one for {item}",
            "{item}: {fault}. a new one please",
            "{fault}. i still want {item}, just a proper one",
            "about {item}, {fault}, when can you send a second one?",
            "{item} needs a replacement, {fault}",
            "{fault}, and i do want to keep {item}, so send what is right",
        ),
    ),
    Function(
        "refund",
        1.0,
        ("item",),
        (
            "check [where my money for {item} is|the refund of {item}]",
            "tell me when the [money|refund] for {item} [comes|hits my account]",
            "look into the missing payment back for {item}",
            "say why {item} was not paid back yet",
        ),
        (
            "know when i get [my money|paid back] for {item}",
            "know what happened to the refund of {item}",
            "see the money for {item} on my card",
        ),
        (
            "i sent {item} back [weeks|ages] ago and see no money",
            "[no|still no] refund for {item}",
            "you got {item} back long ago, my bank shows nothing",
            "where is the money for {item}?",
            "my card was never credited for {item}",
            "{item} went back to you, when do i get paid?",
            "how long do you sit on the cash for {item}",
        ),
    ),
    Function(
        "stock",
        1.0,
        ("item", "colour"),
        (
            "check if you have {thing} in {colour}",
            "see whether {colour} {thing} is in stock",
            "tell me if {thing} comes in {colour}",
            "look if there is any {thing} left in {colour}",
        ),
        (
            "know if you have {thing} in {colour}",
            "buy {thing}, is {colour} available",
            "know whether {colour} {thing} is sold out",
            "order {thing} in {colour} if you have any",
        ),
        (
            "[do you|you guys] have {colour} {thing}?",
            "is there {thing} in {colour}[| at the moment| right now]?",
            "any {colour} {thing} left?",
            "is {colour} {thing} [sold out|available|gone]?",
            "when is {thing} in {colour} back on the shelf",
            "looking for {thing}, must be {colour}, got one?",
            "{thing}, {colour}, on stock?",
        ),
    ),
    Function(
        "invoice",
        1.0,
        ("item", "by"),
        (
            "send [the|an] [invoice|bill|receipt] for {item} {by}",
            "give me the [bill|receipt] of {item} {by}",
            "put the [invoice|receipt] for {item} [out |]{by}",
            "get me something for my tax office about {item} {by}",
        ),
        (
            "have the [invoice|bill|receipt] for {item} {by}",
            "get proof of what i paid for {item} {by}",
            "see the [bill|invoice] of {item} {by}",
        ),
        (
            "my boss wants a [receipt|bill] for {item}, {by} [please|is fine]",
            "i never got the [invoice|paperwork] for {item}, {by} would be good",
            "for my taxes i need what i paid for {item}, {by}",
            "{by} please, the [receipt|invoice] of {item}",
            "no bill in the box with {item}, i want it {by}",
        ),
    ),
    Function(
        "callback",
        1.0,
        ("day", "time"),
        (
            "[call|ring|phone] me {day} {time}",
            "have someone call me {day}, {time}",
            "let a human ring me {time} on {day}",
            "give me a call {day} {time}",
            "try my mobile {day} {time}",
        ),
        (
            "talk to [a person|someone real] {day} {time}",
            "be called {day} {time}",
            "speak with somebody {time}, {day}",
            "get a call {day} {time}",
        ),
        (
            "i hate typing, {day} {time} you can reach me on the phone",
            "a call {day} {time} would be good",
            "is anyone free to talk {day} {time}?",
            "ring {day} {time}, i will pick up",
            "this is easier by voice, {day} {time}?",
            "{time} on {day} i have time for a call",
        ),
    ),
    Function(
        "account",
        0.9,
        ("field",),
        (
            "[change|update|correct] my {field}",
            "put a new {field} on my account",
            "[reset|fix] my {field}",
            "swap the old {field} in my profile for the new one",
        ),
        (
            "[change|update] my {field}",
            "set a new {field}",
            "have a different {field} on file",
            "correct the {field} in my profile",
        ),
        (
            "my {field} is [out of date|no longer right|old]",
            "i [have|got] a new {field}, how do i tell you",
            "there is a mistake in my {field} on your site",
            "how do i edit my {field}?",
            "you have the wrong {field} for me",
            "the {field} in my profile is not mine any more",
        ),
    ),
)

NONE_WEIGHT = 1.6
NONE: tuple[str, ...] = (
    "what is the weather [like |]{day}?",
    "[tell|write] me a [joke|poem|story] about {item}",
    "are you hiring [people |drivers |][at the moment|right now|for {day}]?",
    "i [love|really like|am so happy with] {item}[|, well done|, great job]",
    "how do i [clean|store|look after|repair] {item} [myself|at home]?",
    "is {item} [good|worth the money|better than {other}]?",
    "which is [better|nicer|heavier], {item} or {other}?",
    "[when|at what time] do your shops [open|close] {day}?",
    "who won the [game|match|race] [{day}|last night]?",
    "[what|how much] does {thing} [weigh|cost to run]?",
    "can i [cook|make] [soup|rice|pancakes] with {item}?",
    "what [colour|size] would you [take|choose] for {thing}?",
    "do you [ship|deliver] to [norway|iceland|the moon]?",
    "how old are you[|, robot]?",
    "are you a [robot|machine|real person]?",
    "my {field} is none of your business",
    "[play|put on] some music {time}",
    "set an alarm for {day} {time}",
    "book [a table|a taxi|a dentist] for {day} {time}",
    "translate {thing} into [french|spanish|german]",
    "is there a [student|family|christmas] discount on {thing}?",
    "what is the capital of [peru|chad|norway|laos]?",
    "[remind|tell] me to [call|ring] my mother {day}",
    "the driver who brought {item} was [very kind|so friendly|singing]",
    "thanks, {item} [is here|arrived] and all is fine",
    "no question, just [saying hi|bored|testing this chat]",
    "how many {thing} did you sell [last year|{day}]?",
    "do you give money to [charity|schools|animal shelters]?",
    "where [is|do you make] {item} [made|built|from]?",
    "[what|which] material is {item} made of?",
    "my neighbour also bought {thing}, funny",
    "can you [recommend|suggest] [a film|a book|a good {thing}]?",
    "the return of the king is [a great film|my favourite film]",
    "i never cancel a friendship, do you?",
    "what does your logo mean",
    "is your [boss|owner] on holiday {day}?",
    "my cat [sleeps on|hates|knocked over] {item}, so [cute|funny]",
    "[sell|lend] me your old {thing}",
    "do i need a licence to [use|own] {thing}?",
    "[i am looking for|do you offer] work in the warehouse {day}",
    "why is the sky {colour}",
    "paint my wall {colour} {day}",
    "{colour} is my favourite colour",
    "how long is the warranty on {thing} in general",
    "[nice|cool|great] app by the way, the {colour} icon is lovely",
    "[can|does] {item} run on batteries?",
    "send me [a postcard|love|good vibes] {by}",
)

ASK_FRAMES: tuple[str, ...] = (
    "[can|could|would|will] you [please |kindly |maybe |]{act}?",
    "[please|pls|plz] {act}",
    "{act}[| please| pls|, thanks]",
    "i need you to {act}",
    "[is it|would it be] possible that you {act}?",
    "[any chance|would you mind if] you {act}?",
    "i [want|would like] you to {act}",
    "you [have to|must|should] {act}[| now| soon]",
    "be so [kind|good] and {act}",
    "somebody has to {act}",
)
WANT_FRAMES: tuple[str, ...] = (
    "i [want|need|wish|have] to {act}",
    "i [would|'d] [like|love] to {act}",
    "[can|could|may] i {act}?",
    "how [do|can|could] i {act}?",
    "is it [possible|ok] to {act}?",
    "i am trying to {act}",
    "my [wife|husband|mum|boss] [wants|needs|asked me] to {act}",
    "[help me|what do i do] to {act}[|?]",
    "we [want|need|would like] to {act}",
    "let me {act}",
    "i was hoping to {act}",
)

OPENINGS: tuple[str, ...] = (
    "[hi|hello|hey|hey there|good morning|good evening|dear team|greetings|yo]",
    "[hi|hello|hey] [there|team|all|support|desk]",
    "[sorry|excuse me][| to bother you| for the trouble]",
    "[quick|short|simple|one|a] [question|thing|request]",
    "ok [so|listen|then]",
    "[me again|it is me again|back once more]",
    "[hope|trust] you are [well|fine|having a good day]",
    "[not sure|no idea] if this is the right place",
    "first time [i write|using this chat]",
    "i tried [your site|the app|the help page] and [got lost|gave up|it hangs]",
    "my [daughter|son|granny] is [asking|waiting|impatient]",
    "[to whom it may concern|dear sir or madam]",
    "this is [the third|my second|my last] [message|try]",
    "i have been a customer for [years|two years|ages]",
)
CLOSINGS: tuple[str, ...] = (
    "[thanks|thank you|thx|cheers|ty][| a lot| so much| in advance| anyway]",
    "[bye|best wishes|kind regards|all the best|greetings from the north]",
    "[it is|this is] [urgent|not urgent|a bit urgent|important to me]",
    "[please hurry|asap|as soon as you can|no rush|take your time]",
    "let me know[| soon| if that works]",
    "[hope|trust] that [helps|is ok|works]",
    "i am [not happy|really annoyed|very patient|counting on you]",
    "sent from [the train|my bed|a tiny keyboard]",
    "[that is all|nothing else|just that]",
    "[sorry|apologies] for [the typos|the hassle|the long text]",
    "you people are [great|too slow|the best]",
    "i will [wait|check back later|tell my friends]",
)
CHATTER: tuple[str, ...] = (
    "we are [moving house|painting the flat|away on a trip]",
    "the [kids|neighbours|dogs] [keep|are] [asking|going mad|making noise]",
    "it was [a present|a gift|meant] for my [mother|brother|best friend]",
    "i [work nights|am at work all day|only have one arm free]",
    "your [site|page|chat] is [slow|pretty|confusing]",
    "i paid [with my card|in full|a lot]",
    "last time [everything went fine|it took forever|you were quick]",
    "the [driver|courier] [was nice|rang twice|never rings]",
    "i [spoke|talked] to [sam|a colleague of yours|nobody] [before|last week]",
    "the box [is|was] [huge|tiny|still closed]",
    "[it rained|it has been hot] all week",
    "i [read|know] your [rules|terms] [well|by heart]",
)
BACKSTORY: tuple[str, ...] = (
    "i [bought|ordered|got] {a_item} [last week|last month|on {other_day}|a few days ago|from you]",
    "[it is|this is] about {the_item}",
    "[i have|there is] a [question|problem|thing] [with|about] {the_item}",
    "regarding {the_item}",
    "so, {the_item}",
    "you [know|remember] {the_item} [i bought|i told you about|from {other_day}]?",
)
ASIDES: tuple[str, ...] = (
    "the {other} [came|arrived] [on {other_day}|fine|already]",
    "i [also|once] bought {other_a} and [that was fine|love it]",
    "my friend has {other_a} from you",
    "the {other} [is great|works well|can stay]",
    "i wrote on {other_day} too",
    "{other_day} i was out",
)
TWO: tuple[str, ...] = (
    "{main}. [later|next week|some other time] i also want to {want}[, but not now|, different story]",
    "i was going to {want}, but [first|for now|more urgent]: {main}",
    "[at first i wanted to|i thought i had to] {want}, [but no|that is sorted]. {main}",
    "{main}. i will [ask|write] again when i want to {want}",
    "yesterday you helped me to {act}, [great|thanks]. today: {main}",
    "a colleague of yours will {act} already. [my question is|what i need]: {main}",
)
NEGATIONS: tuple[str, ...] = (
    "i do not want to {want}, [just this|only this|but]: {main}",
    "[no need to|do not|please never] {act}, [instead|rather|only]: {main}",
    "{main}. [do not|no need to|you do not have to] {act}",
    "it is not that i want to {want}. {main}",
    "{main}, i am not asking to {act}",
    "last time somebody tried to {act}, that was wrong. {main}",
)
CORRECTIONS: tuple[str, ...] = (
    "{wrong}, [no|sorry|oops|wait], [i mean |make that |]{right}",
    "{wrong}, or rather {right}",
    "not {wrong} but {right}",
    "{right} (not {wrong})",
    "{right}, not {wrong}",
)
DETERMINERS: tuple[str, ...] = ("the", "the", "my", "my", "my new", "that", "this", "our")

SHORT: dict[str, tuple[str, ...]] = {
    "you": ("u",),
    "your": ("ur",),
    "please": ("pls", "plz"),
    "because": ("cuz", "bc"),
    "are": ("r",),
    "thanks": ("thx", "tnx"),
    "delivery": ("dlvry",),
    "to": ("2",),
    "for": ("4",),
    "would": ("wd",),
    "with": ("w/",),
    "something": ("sth",),
    "somebody": ("sb",),
    "want to": ("wanna",),
    "do not": ("dont", "don't"),
    "does not": ("doesnt", "doesn't"),
    "it is": ("its", "it's"),
    "i am": ("im", "i'm"),
    "i have": ("ive", "i've"),
    "i would": ("i'd", "id"),
    "going to": ("gonna",),
}
RUDE: frozenset[str] = frozenset(("shit", "piss", "tit", "cock", "cunt", "fuck", "arse", "ass"))
KEYS: dict[str, str] = {
    "a": "s", "b": "v", "c": "x", "d": "f", "e": "r", "f": "g", "g": "h", "h": "j", "i": "o", "j": "k", "k": "l",
    "l": "k", "m": "n", "n": "b", "o": "p", "p": "o", "q": "w", "r": "t", "s": "d", "t": "y", "u": "i", "v": "c",
    "w": "e", "x": "z", "y": "u", "z": "x",
}  # fmt: skip
