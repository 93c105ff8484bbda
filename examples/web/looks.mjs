// "Where the queries look": attention without boxes beside attention with them.
import { itcScore } from './lib/retriever.mjs';
import { attentionOf, paint, shareOn } from './heat.mjs';

const find = (id) => document.getElementById(id);

/**
 * `look`: `match` for the query that matches the sentence best, `boxes` for all queries of the selected box's own set
 * (of the one set there is, where boxes share it). `choose(look or box number)` is called when somebody takes another.
 */
export function showLooks({ picture, sentence, features, selected, look, info }, choose) {
  const split = features.sets.some((box) => box >= 0), boxes = picture.boxed ? picture.boxes : [];
  const box = split ? features.sets[Math.max(0, features.sets.indexOf(selected))] : -1;
  const shown = look === 'match' ? 'match' : split ? box : 'all';
  const choices = [...(split ? boxes.map((_, index) => [index, `Box ${index + 1}`]) : [['all', 'All queries']]), ['match', 'Best match']];
  showChips(choices, shown, choose);
  const before = attention(picture.stock, sentence, shown === 'match' ? 'match' : 'all');
  const after = attention(features, sentence, shown);
  const most = Math.max(...before.slice(info.prefix), ...after.slice(info.prefix));
  const masks = masksOf(features), mask = typeof shown === 'number' ? masks[shown] : union(masks);
  for (const [id, map] of [['map-before', before], ['map-after', after]]) {
    const canvas = find(id), frame = canvas.parentElement;
    paint(canvas, map, info.patches, info.prefix, most);
    frame.style.aspectRatio = `${picture.width} / ${picture.height}`;
    if (frame.firstElementChild.getAttribute('src') !== picture.url) frame.firstElementChild.src = picture.url;
    canvas.ariaLabel = mask ? `${percent(shareOn(map, mask))} of the attention is on the boxed part` : 'attention over the picture';
    showBoxes(frame.lastElementChild, picture, typeof shown === 'number' ? [boxes[shown]] : boxes);
  }
  const who = shown === 'match' ? 'Of the query that matches the sentence best' : 'Of all queries’ attention';
  const where = typeof shown === 'number' ? `box ${shown + 1}` : 'the boxed part';
  find('share').innerHTML = mask
    ? `${who}, <b>${percent(shareOn(before, mask))} → ${percent(shareOn(after, mask))}</b> falls on ${where}.`
    : 'Draw a box, and the queries turn to it.';
  find('share').dataset.shares = mask ? [shareOn(before, mask), shareOn(after, mask)] : '';
}

function attention(features, sentence, shown) {
  const all = Array.from({ length: features.queries }, (_, query) => query);
  if (shown !== 'match') return attentionOf(features.attention, shown === 'all' ? 0 : features.sets.indexOf(shown), all);
  const { query } = itcScore(features, sentence.vector);
  return attentionOf(features.attention, Math.floor(query / features.queries), [query % features.queries]);
}

function masksOf({ masks }) {
  if (!masks) return [];
  const [, count, width] = masks.dims;
  return Array.from({ length: count }, (_, box) => masks.data.subarray(box * width, (box + 1) * width));
}

function union(masks) {
  return masks.length ? masks[0].map((_, token) => Math.max(...masks.map((mask) => mask[token]))) : null;
}

function showChips(choices, shown, choose) {
  const chips = find('chips');
  if (chips.dataset.choices !== String(choices)) {
    chips.dataset.choices = String(choices);
    chips.replaceChildren(...choices.map(([look, label]) => {
      const chip = document.createElement('button');
      Object.assign(chip, { type: 'button', role: 'radio', textContent: label });
      chip.addEventListener('click', () => choose(look));
      return chip;
    }));
  }
  choices.forEach(([look], index) => {
    chips.children[index].ariaChecked = String(look === shown);
  });
}

function showBoxes(layer, { width, height }, boxes) {
  layer.replaceChildren(...boxes.map(([x1, y1, x2, y2]) => {
    const outline = document.createElement('i');
    const sides = { left: x1 / width, top: y1 / height, width: (x2 - x1) / width, height: (y2 - y1) / height };
    for (const [side, share] of Object.entries(sides)) outline.style[side] = `${100 * share}%`;
    return outline;
  }));
}

const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
