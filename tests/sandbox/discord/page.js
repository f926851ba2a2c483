"use strict";

// Plays one person's client by the control plane. Everything that comes from the bot is put in as text, never as HTML.

const BUTTON = 2, MENU = 3, TEXT_INPUT = 4, TEXT_DISPLAY = 10;
const STRING = 3, INTEGER = 4, BOOLEAN = 5, NUMBER = 10;
const PATIENCE = 25;

const state = {
  user: location.hash.slice(1) || "ada",
  users: [],
  commands: [],
  replyTo: null,
  shown: new Map(),      // what each message was drawn from
  chosen: new Map(),     // what is chosen in a menu, by message and custom_id
  open: null,            // the menu that is open
  failed: new Map(),     // why, by message
  dismissed: new Set(),  // ephemeral messages that were put away
  modal: null,
};

const $ = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") made.toggleAttribute(name, value);
    else if (value !== undefined && value !== null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// Talking to the stand-in

async function ask(method, path, body) {
  const response = await fetch(`/_sandbox/${path}`, {
    method,
    headers: body ? { "Content-Type": "application/json" } : {},
    body: body ? JSON.stringify(body) : undefined,
  });
  const text = await response.text();
  if (!response.ok) throw new Error(text.trim() || `status ${response.status}`);
  return { value: text ? JSON.parse(text) : null, version: Number(response.headers.get("Sandbox-Version")) };
}

async function act(action, body) {
  notice("");
  try {
    return (await ask("POST", `users/${encodeURIComponent(state.user)}/${action}`, body)).value;
  } catch (error) {
    notice(error.message);
    return null;
  }
}

// What became of an interaction, once the bot has answered or let it fail.
async function outcome(interaction) {
  for (;;) {
    const { value, version } = await ask("GET", `interactions/${interaction.id}`);
    if (value.state !== "pending") return value;
    await ask("GET", `changes?after=${version}&patience=${PATIENCE}`);
  }
}

async function follow() {
  for (;;) {
    try {
      const version = await refresh();
      await ask("GET", `changes?after=${version}&patience=${PATIENCE}`);
    } catch {
      setStatus(null);
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
}

async function refresh() {
  const user = state.user;
  const users = await ask("GET", "users");
  const [messages, commands, gateway] = await Promise.all([
    ask("GET", `users/${encodeURIComponent(user)}/messages`), ask("GET", "commands"), ask("GET", "gateway"),
  ]);
  if (user !== state.user) return users.version;
  state.users = users.value;
  state.commands = commands.value.flatMap((command) => spread(command));
  drawPeople();
  drawMessages(messages.value);
  named(gateway.value.bot);
  setStatus(gateway.value.sessions.some((session) => session.connected));
  return users.version;
}

function setStatus(online) {
  $("status").textContent = online === null ? "Stand-in stopped" : online ? "Online" : "Offline";
  $("status").className = online ? "online" : "";
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

// Text

const MARKS = new RegExp([
  /\\(?<escaped>[!-/:-@[-`{-~])/, /```(?:\w*\n)?(?<block>[^]+?)```/, /`(?<code>[^`]+)`/, /\*\*(?<bold>.+?)\*\*/,
  /__(?<underlined>.+?)__/, /\*(?<starred>\S.*?)\*/, /\b_(?<italic>\S.*?)_\b/, /~~(?<struck>.+?)~~/,
  /<t:(?<time>\d+)(?::(?<format>[tTdDfFR]))?>/, /<@!?(?<user>\d+)>/, /<\/(?<command>[^:>]+):\d+>/,
].map((each) => each.source).join("|"), "g");

function* inline(text) {
  let end = 0;
  for (const found of text.matchAll(MARKS)) {
    if (found.index > end) yield text.slice(end, found.index);
    yield marked(found.groups);
    end = found.index + found[0].length;
  }
  if (end < text.length) yield text.slice(end);
}

function marked(groups) {
  if (groups.escaped) return groups.escaped;
  if (groups.block) return element("pre", {}, groups.block.replace(/\n$/, ""));
  if (groups.code) return element("code", {}, groups.code);
  if (groups.bold) return element("b", {}, ...inline(groups.bold));
  if (groups.underlined) return element("u", {}, ...inline(groups.underlined));
  if (groups.starred || groups.italic) return element("i", {}, ...inline(groups.starred || groups.italic));
  if (groups.struck) return element("s", {}, ...inline(groups.struck));
  if (groups.time) return element("time", { class: "mention" }, moment(Number(groups.time) * 1000, groups.format));
  if (groups.command) return element("span", { class: "mention" }, `/${groups.command}`);
  return element("span", { class: "mention" }, `@${nameOf(state.users.find((user) => user.id === groups.user)?.name)}`);
}

function moment(milliseconds, format) {
  if (format !== "R") return new Date(milliseconds).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
  const seconds = Math.round((milliseconds - Date.now()) / 1000);
  const [size, unit] = [[86400, "day"], [3600, "hour"], [60, "minute"]].find(([size]) => Math.abs(seconds) >= size)
    || [1, "second"];
  return new Intl.RelativeTimeFormat("en").format(Math.round(seconds / size), unit);
}

// Text with what stands at the beginning of a line: `> ` a quotation, `-# ` small print, `# ` a heading.
function* rich(text) {
  const lines = text.split(/\n(?=(?:[^`]|`(?!``))*(?:```[^]*?```(?:[^`]|`(?!``))*)*$)/);
  for (const [number, line] of lines.entries()) {
    const found = line.match(/^(?<start>> |-# |#{1,3} )(?<rest>[^]*)$/);
    if (number && !found && !lines[number - 1].match(/^(> |-# |#{1,3} )|```$/)) yield "\n";
    if (!found) yield* inline(line);
    else if (found.groups.start === "> ") yield element("blockquote", {}, ...inline(found.groups.rest));
    else if (found.groups.start === "-# ") yield element("div", {}, element("small", {}, ...inline(found.groups.rest)));
    else yield element("div", {}, element("b", {}, ...inline(found.groups.rest)));
  }
}

function nameOf(name) {
  return name ? name[0].toUpperCase() + name.slice(1) : "unknown-user";
}

// People

function drawPeople() {
  const drawn = state.users.map((user) => user.name).join(" ") + state.user;
  if ($("people").dataset.drawn === drawn) return;
  $("people").dataset.drawn = drawn;
  $("people").replaceChildren(...state.users.map((user) => element("button", {
    type: "button", role: "radio", id: `user-${user.name}`, "data-user": user.name,
    "aria-checked": String(user.name === state.user), onclick: () => become(user.name),
  }, avatar(user.name), nameOf(user.name))));
}

function become(name) {
  state.user = name;
  location.hash = name;
  state.shown.clear();
  state.replyTo = null;
  drawReplying();
  $("messages").replaceChildren();
  refresh();
}

function avatar(name, bot = false) {
  return element("span", { class: `avatar ${bot ? "bot" : name}`, "aria-hidden": "true" }, nameOf(name)[0]);
}

// Messages

function drawMessages(messages) {
  const list = $("messages");
  const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 60;
  const visible = messages.filter((each) => !state.dismissed.has(each.message.id));
  list.querySelector(":scope > p")?.remove();
  for (const id of state.shown.keys()) {
    if (!visible.some((each) => each.message.id === id)) forget(id);
  }
  let before = null;
  for (const each of visible) {
    before = drawMessage(list, each, messages, before);
  }
  if (!visible.length) list.replaceChildren(element("p", {}, "Nobody has written yet."));
  if (atEnd) list.scrollTop = list.scrollHeight;
}

function named(bot) {
  $("bot-name").textContent = bot;
  $("text").placeholder = `Message @${bot}`;
  document.querySelector("main > header .avatar").textContent = bot[0];
}

function forget(id) {
  state.shown.delete(id);
  document.querySelector(`[data-message="${id}"]`)?.remove();
}

// Draw a message anew only if it has changed, so that what is open in it stays open. Returns its element.
function drawMessage(list, each, messages, before) {
  const { id } = each.message;
  const answered = messages.find((other) => other.message.id === each.reply_to);
  const source = JSON.stringify([each, answered?.message.content, state.failed.get(id)]);
  let drawn = list.querySelector(`[data-message="${id}"]`);
  if (state.shown.get(id) !== source) {
    const fresh = articleOf(each, answered);
    drawn ? drawn.replaceWith(fresh) : before ? before.after(fresh) : list.prepend(fresh);
    drawn = fresh;
    state.shown.set(id, source);
  }
  return drawn;
}

function articleOf(each, answered) {
  const { message } = each;
  const author = each.by_bot ? each.author : nameOf(each.author);
  const content = each.loading ? `${author} is thinking…` : message.content;
  return element("article", {
    "data-message": message.id, "data-author": each.author, class: each.ephemeral ? "ephemeral" : "",
    "aria-label": `Message from ${author}`,
  },
  each.reply_to ? element("div", { class: "quote" }, quoted(answered)) : null,
  avatar(each.author, each.by_bot),
  element("div", {},
    element("div", { class: "byline" }, author, each.by_bot ? element("span", { class: "badge" }, "App") : null,
      element("time", { datetime: message.timestamp }, clock(message.timestamp))),
    content ? element("div", { class: "body" }, ...rich(content),
      message.edited_timestamp ? element("span", { class: "note" }, " (edited)") : null) : null,
    ...message.embeds.map(embedOf),
    ...message.components.map((row) => rowOf(message, row)),
    !content && message.edited_timestamp ? element("div", { class: "note" }, "(edited)") : null,
    state.failed.has(message.id) ? element("div", { class: "failed", role: "alert" }, state.failed.get(message.id)) : null,
    each.ephemeral ? element("div", { class: "note" }, "Only you can see this · ",
      element("button", { type: "button", onclick: () => dismiss(message.id) }, "Dismiss message")) : null),
  each.ephemeral ? null : element("button", {
    type: "button", class: "reply", "data-action": "reply", onclick: () => replyTo(each),
  }, "Reply"));
}

function quoted(answered) {
  if (!answered) return "Original message was deleted";
  const text = answered.message.content || answered.message.embeds[0]?.title || "Click to see attachment";
  return `@${nameOf(answered.author)} ${text.replaceAll("\\", "")}`;
}

function clock(timestamp) {
  return new Date(timestamp).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
}

function dismiss(id) {
  state.dismissed.add(id);
  forget(id);
}

function embedOf(embed) {
  const drawn = element("section", { class: "embed", "aria-label": embed.title || "Embed" },
    embed.author ? element("div", { class: "author" }, embed.author.name) : null,
    embed.title ? element("div", { class: "title" }, ...inline(embed.title)) : null,
    embed.description ? element("div", { class: "body" }, ...rich(embed.description)) : null,
    embed.fields ? element("div", { class: "fields" }, ...embed.fields.map((field) => element("div", {
      class: field.inline ? "field inline" : "field",
    }, element("div", { class: "name" }, ...inline(field.name)), element("div", { class: "body" }, ...rich(field.value)))))
      : null,
    embed.footer || embed.timestamp ? element("div", { class: "footer" },
      [embed.footer?.text, embed.timestamp && moment(Date.parse(embed.timestamp))].filter(Boolean).join(" · ")) : null);
  if (embed.color) drawn.style.borderLeftColor = `#${embed.color.toString(16).padStart(6, "0")}`;
  return drawn;
}

function rowOf(message, row) {
  return element("div", { class: "row" }, ...row.components.map((component) =>
    component.type === BUTTON ? buttonOf(message, component) : menuOf(message, component)));
}

function buttonOf(message, button) {
  const label = [button.emoji?.name, button.label].filter(Boolean).join(" ");
  return element("button", {
    type: "button", class: `style-${button.style}`, "data-custom-id": button.custom_id, disabled: Boolean(button.disabled),
    title: button.url, onclick: () => button.custom_id && use(message, "click", { button: button.custom_id }),
  }, label);
}

// Buttons and menus

async function use(message, action, wish) {
  state.failed.delete(message.id);
  const interaction = await act(action, { message: message.id, ...wish });
  if (!interaction) return;
  const answer = await outcome(interaction);
  if (answer.state === "failed") state.failed.set(message.id, "This interaction failed");
  if (answer.modal) openModal(answer);
  refresh();
}

function menuOf(message, menu) {
  const key = `${message.id} ${menu.custom_id}`;
  const drawn = element("div", { class: "menu", "data-menu": menu.custom_id });
  drawMenu(drawn, key, menu, (values) => use(message, "select", { values, custom_id: menu.custom_id }));
  return drawn;
}

function chosenOf(key, menu) {
  const defaults = menu.options.filter((option) => option.default).map((option) => option.value);
  return state.chosen.get(key) || defaults;
}

function drawMenu(drawn, key, menu, send) {
  const again = () => drawMenu(drawn, key, menu, send);
  const chosen = chosenOf(key, menu);
  const labels = menu.options.filter((option) => chosen.includes(option.value)).map((option) => option.label);
  const isOpen = state.open === key;
  const toggle = element("button", {
    type: "button", class: labels.length ? "" : "empty", disabled: Boolean(menu.disabled), "aria-haspopup": "listbox",
    "aria-expanded": String(isOpen), "aria-label": `${menu.placeholder || "Make a selection"}: ${labels.join(", ")}`,
    onclick: () => { state.open = isOpen ? null : key; again(); },
  }, labels.join(", ") || menu.placeholder || "Make a selection");
  drawn.replaceChildren(toggle, ...(isOpen ? [optionsOf(key, menu, chosen, again, send)] : []));
  if (isOpen) drawn.scrollIntoView({ block: "nearest" });
}

function optionsOf(key, menu, chosen, again, send) {
  const most = menu.max_values ?? 1, least = menu.min_values ?? 1;
  const finish = (values) => { state.open = null; again(); send(values); };
  const pick = (value) => {
    const others = chosen.filter((each) => each !== value);
    const now = most === 1 ? [value] : others.length < chosen.length ? others : [...chosen, value].slice(-most);
    state.chosen.set(key, now);
    if (most === 1) finish(now); else again();
  };
  const options = menu.options.map((option) => element("div", {
    role: "option", tabindex: "0", "data-value": option.value, "aria-selected": String(chosen.includes(option.value)),
    onclick: () => pick(option.value),
    onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); pick(option.value); } },
  }, [option.emoji?.name, option.label].filter(Boolean).join(" "),
  option.description ? element("small", {}, option.description) : null));
  const choose = most === 1 ? null : element("button", {
    type: "button", class: "choose", "data-action": "choose", disabled: chosen.length < least, onclick: () => finish(chosen),
  }, `Choose ${chosen.length}`);
  return element("div", { class: "options" },
    element("div", { role: "listbox", "aria-label": menu.placeholder || "Options", "aria-multiselectable": String(most > 1) },
      ...options), choose);
}

// Modals

function openModal(interaction) {
  state.modal = interaction;
  $("modal-title").textContent = interaction.modal.title;
  $("modal-error").hidden = true;
  $("modal-fields").replaceChildren(...interaction.modal.components.map(modalPart));
  $("modal").showModal();
}

function modalPart(part) {
  if (part.type === TEXT_DISPLAY) return element("div", { class: "body" }, ...rich(part.content));
  const field = part.component || part.components[0];
  const label = part.label || field.label;
  const required = field.required !== false;
  return element("div", { class: "field" },
    element("label", { for: `field-${field.custom_id}` }, label, required ? element("span", { class: "required" }, " *") : null),
    part.description ? element("small", {}, part.description) : null,
    field.type === MENU ? modalMenu(field, label) : modalInput(field, required));
}

function modalInput(field, required) {
  const long = field.style === 2;
  const input = element(long ? "textarea" : "input", {
    id: `field-${field.custom_id}`, "data-field": field.custom_id, placeholder: field.placeholder, required,
    minlength: field.min_length, maxlength: field.max_length ?? 4000,
  });
  input.value = field.value || "";
  return input;
}

function modalMenu(field, label) {
  const key = `modal ${field.custom_id}`;
  state.chosen.delete(key);
  const drawn = element("div", { class: "menu", "data-menu": field.custom_id, id: `field-${field.custom_id}` });
  drawMenu(drawn, key, { ...field, placeholder: field.placeholder || label }, () => {});
  return drawn;
}

async function submitModal(event) {
  event.preventDefault();
  const { modal, id } = state.modal;
  const values = {};
  for (const input of $("modal-fields").querySelectorAll("[data-field]")) values[input.dataset.field] = input.value;
  for (const part of modal.components.filter((each) => each.component?.type === MENU)) {
    values[part.component.custom_id] = chosenOf(`modal ${part.component.custom_id}`, part.component);
  }
  $("modal-submit").disabled = true;
  const interaction = await act("submit", { interaction: id, values });
  const answer = interaction && await outcome(interaction);
  $("modal-submit").disabled = false;
  if (answer?.state === "acknowledged") $("modal").close();
  $("modal-error").textContent = interaction ? "Something went wrong. Try again." : $("notice").textContent;
  $("modal-error").hidden = answer?.state === "acknowledged";
  refresh();
}

// Writing

function replyTo(each) {
  state.replyTo = each;
  drawReplying();
  $("text").focus();
}

function drawReplying() {
  $("replying").hidden = !state.replyTo;
  $("replying").querySelector("span").textContent = state.replyTo ? `Replying to ${nameOf(state.replyTo.author)}` : "";
}

async function say(event) {
  event.preventDefault();
  const text = $("text").value;
  if (!text.trim() || text.startsWith("/")) return;
  if (await act("say", { text, reply_to: state.replyTo?.message.id ?? null })) {
    $("text").value = "";
    state.replyTo = null;
    drawReplying();
    $("messages").scrollTop = $("messages").scrollHeight;
  }
}

// Commands

// A command, or its sub-commands, each with the name it is called by.
function spread(command, path = []) {
  const called = [...path, command.name];
  const inner = (command.options || []).filter((option) => option.type < STRING);
  if (inner.length) return inner.flatMap((option) => spread(option, called));
  return [{ name: called.join(" "), description: command.description, options: command.options || [] }];
}

function showCommands(open) {
  $("commands").hidden = !open;
  $("open-commands").setAttribute("aria-expanded", String(open));
  if (!open) return;
  const typed = $("text").value.replace(/^\//, "").toLowerCase();
  const found = state.commands.filter((command) => command.name.startsWith(typed));
  $("commands").replaceChildren(...found.map((command) => element("button", {
    type: "button", class: "command", "data-command": command.name, onclick: () => fillIn(command),
  }, element("b", {}, `/${command.name}`), element("small", {}, command.description))));
  if (!found.length) $("commands").replaceChildren(element("p", {}, "There is no such command."));
}

function fillIn(command) {
  const fields = command.options.map((option) => commandField(command, option));
  const form = element("form", { id: "command", "data-command": command.name, autocomplete: "off", onsubmit: (event) => {
    event.preventDefault();
    slash(command);
  } }, element("h3", {}, `/${command.name}`), element("small", {}, command.description), ...fields, element("footer", {},
    element("button", { type: "button", onclick: () => showCommands(false) }, "Cancel"),
    element("button", { id: "use-command", class: "style-1" }, "Use command")));
  $("commands").replaceChildren(form);
  (form.querySelector("input, select") || form.querySelector("#use-command")).focus();
}

function commandField(command, option) {
  const id = `option-${option.name}`;
  const choices = option.type === BOOLEAN ? [{ name: "True", value: "true" }, { name: "False", value: "false" }] : option.choices;
  const input = choices?.length
    ? element("select", { id, "data-option": option.name, required: Boolean(option.required) }, element("option", { value: "" }, ""),
      ...choices.map((choice) => element("option", { value: choice.value }, choice.name)))
    : element("input", { id, "data-option": option.name, required: Boolean(option.required), minlength: option.min_length,
      maxlength: option.max_length, type: [INTEGER, NUMBER].includes(option.type) ? "number" : "text" });
  const suggestions = element("div", { class: "suggestions", role: "listbox", "aria-label": `Suggestions for ${option.name}` });
  if (option.autocomplete) {
    for (const kind of ["input", "focus"]) input.addEventListener(kind, () => complete(command, option, input, suggestions));
  }
  return element("div", { class: "field" }, element("label", { for: id }, option.name,
    option.required ? element("span", { class: "required" }, " *") : null, " ", element("small", {}, option.description)),
  input, suggestions);
}

async function complete(command, option, input, suggestions) {
  delete input.dataset.value;
  const typed = input.value;
  const { [option.name]: _, ...options } = givenOptions(command);
  const interaction = await act("autocomplete", { command: command.name, option: option.name, text: typed, options });
  const answer = interaction && await outcome(interaction);
  if (!answer || input.value !== typed || !input.isConnected) return;
  suggestions.replaceChildren(...(answer.choices || []).map((choice) => element("button", {
    type: "button", class: "suggestion", role: "option", "data-choice": choice.value, onclick: () => {
      input.value = choice.name;
      input.dataset.value = choice.value;
      suggestions.replaceChildren();
    },
  }, choice.name)));
}

function givenOptions(command) {
  const given = {};
  for (const option of command.options) {
    const input = document.querySelector(`#command [data-option="${option.name}"]`);
    const value = input.dataset.value ?? input.value;
    if (value === "") continue;
    given[option.name] = option.type === BOOLEAN ? value === "true" : [INTEGER, NUMBER].includes(option.type) ? Number(value) : value;
  }
  return given;
}

async function slash(command) {
  const interaction = await act("slash", { command: command.name, options: givenOptions(command) });
  if (!interaction) return;
  $("text").value = "";
  showCommands(false);
  const answer = await outcome(interaction);
  if (answer.state === "failed") notice("The application did not respond");
  if (answer.modal) openModal(answer);
}

// Beginning

$("composer").addEventListener("submit", say);
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) say(event);
});
$("text").addEventListener("input", () => showCommands($("text").value.startsWith("/")));
$("open-commands").addEventListener("click", () => showCommands($("commands").hidden));
$("cancel-reply").addEventListener("click", () => { state.replyTo = null; drawReplying(); });
$("modal").querySelector("form").addEventListener("submit", submitModal);
for (const id of ["modal-close", "modal-cancel"]) $(id).addEventListener("click", () => $("modal").close());
follow();
