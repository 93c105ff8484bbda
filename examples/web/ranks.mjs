// Ranked lists that keep their elements, so that what moves can be seen moving.

/**
 * Shows `items` in order in a list. Each has a `key`; `make(item)` makes its element once and `update(element, item,
 * place)` fills it. Elements slide to their new places, unless the reader asked for less motion.
 */
export function showRanked(list, items, make, update) {
  const known = new Map([...list.children].map((element) => [element.dataset.key, element]));
  const before = new Map([...known.values()].map((element) => [element, element.getBoundingClientRect()]));
  const order = items.map((item, place) => {
    const element = known.get(item.key) ?? make(item);
    element.dataset.key = item.key;
    update(element, item, place);
    return element;
  });
  const focused = document.activeElement;
  if (order.some((element, place) => list.children[place] !== element) || list.children.length !== order.length)
    list.replaceChildren(...order);
  if (focused && focused !== document.activeElement && list.contains(focused)) focused.focus({ preventScroll: true });
  if (matchMedia('(prefers-reduced-motion: reduce)').matches) return;
  for (const element of order) {
    const old = before.get(element), now = element.getBoundingClientRect();
    const [across, down] = old ? [old.left - now.left, old.top - now.top] : [0, 0];
    if (across || down)
      element.animate([{ transform: `translate(${across}px, ${down}px)` }, { transform: 'none' }], { duration: 320, easing: 'cubic-bezier(.2,.8,.2,1)' });
  }
}

/** Ranks from 1 of scores, the highest first; ties in order. */
export function ranksOf(scores) {
  const ranks = [];
  scores.map((_, index) => index).sort((a, b) => scores[b] - scores[a] || a - b).forEach((index, place) => {
    ranks[index] = place + 1;
  });
  return ranks;
}

/** Marks how far something moved from its rank without boxes. */
export function showMove(element, before, now) {
  const by = before - now;
  element.textContent = by ? `${by > 0 ? '▲' : '▼'} ${Math.abs(by)}` : '';
  element.className = `move ${by > 0 ? 'up' : by < 0 ? 'down' : ''}`;
  element.title = by ? `${by > 0 ? 'up' : 'down'} from place ${before}` : '';
}
