"""Short texts of four kinds, written for this package, to see how well a vocabulary compresses each."""

NEWS = """\
The harbour ferry will run again from Monday, the city council said on Thursday, eleven months after a winter storm
tore away the landing stage on the northern bank. Repairs cost 4.2 million euros, about a third more than planned,
because divers found that two of the old steel piles had rusted through below the waterline.

Boats leave every twenty minutes between 6:10 a.m. and 11:30 p.m., and every ten during the morning rush. A single
ticket stays at 1.80 euros; holders of a monthly pass travel free of charge until the end of March. Before the storm
some 9,000 people crossed the river by ferry on a working day, most of them on their way to the hospital and the
university.

"We know how long this year has been for everybody who had to take the bus over the bridge," a spokeswoman for the
port authority told reporters. Shopkeepers on the quay, who lost up to half of their customers, welcomed the news
but asked for compensation. A decision on their claim is expected before the council's summer recess, on 14 July.
Opposition members called the delay "a lesson in how not to maintain public property", and want an inquiry into who
signed off the last inspection.
"""

CODE = '''\
from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field


@dataclass(order=True)
class Job:
    """Work that is due at a time; the earliest comes first."""

    due_s: float
    name: str = field(compare=False)
    retries: int = field(default=0, compare=False)


class Scheduler:
    def __init__(self, jobs: Iterable[Job] = (), max_retries: int = 3) -> None:
        self._queue: list[Job] = list(jobs)
        self._max_retries = max_retries
        heapq.heapify(self._queue)

    def ready(self, now_s: float) -> Iterator[Job]:
        while self._queue and self._queue[0].due_s <= now_s:
            yield heapq.heappop(self._queue)

    def failed(self, job: Job, now_s: float) -> bool:
        """Put a job back with twice the delay; False when it has been tried too often."""
        if job.retries >= self._max_retries:
            return False
        delay_s = 2.0 ** (job.retries + 1)
        heapq.heappush(self._queue, Job(now_s + delay_s, job.name, job.retries + 1))
        return True


if __name__ == "__main__":
    scheduler = Scheduler(Job(0.1 * i, f"job-{i:03d}") for i in range(10))
    for job in scheduler.ready(now_s=0.55):
        print(f"{job.due_s:6.2f}  {job.name!r}")  # six of them

// the same queue, elsewhere
#include <stdint.h>
static inline uint32_t parent(uint32_t i) { return (i - 1) >> 1; }
void sift_up(double *heap, uint32_t i) {
    while (i > 0 && heap[i] < heap[parent(i)]) {
        double tmp = heap[i]; heap[i] = heap[parent(i)]; heap[parent(i)] = tmp;
        i = parent(i);
    }
}
'''

SCIENCE = """\
Photosynthesis stores the energy of light in chemical bonds: 6 CO2 + 6 H2O -> C6H12O6 + 6 O2, with a change of free
energy of about +2,870 kJ/mol. In the thylakoid membranes, photosystem II oxidises water and passes electrons through
plastoquinone, the cytochrome b6f complex and plastocyanin to photosystem I, which reduces NADP+ to NADPH. The proton
gradient that builds up on the way (ΔpH ≈ 2.5) drives ATP synthase.

A population that grows at the rate r up to a carrying capacity K follows the logistic equation dN/dt = rN(1 - N/K),
with the solution N(t) = K / (1 + ((K - N0)/N0) e^(-rt)). Near N = K/2 growth is fastest; its linearisation about the
fixed point N = K has the eigenvalue -r, so the equilibrium is stable.

Let $f \\colon \\mathbb{R}^n \\to \\mathbb{R}$ be convex with an $L$-Lipschitz gradient. Gradient descent with the step
$\\eta = 1/L$ satisfies
$$ f(x_k) - f(x^*) \\le \\frac{L \\lVert x_0 - x^* \\rVert^2}{2k}, $$
so that an error below ε takes O(1/ε) steps; acceleration improves this to O(1/√ε). We measured k = 412 ± 9 steps
(n = 30 runs, p < 0.001, 95 % confidence interval 409 to 415) at 300 K and 1.013 × 10^5 Pa.
"""

MULTILINGUAL = """\
La bibliothèque du port a rouvert ce matin. Les enfants du quartier y lisent après l'école, et les livres sont gratuits.
La biblioteca del puerto abrió de nuevo esta mañana. Los niños del barrio leen allí después de la escuela.
A biblioteca do porto reabriu esta manhã. As crianças do bairro leem lá depois da escola, e os livros são gratuitos.
Die Bücherei am Hafen hat heute Morgen wieder geöffnet. Die Kinder des Viertels lesen dort nach der Schule.
La biblioteca del porto ha riaperto questa mattina. I bambini del quartiere ci leggono dopo la scuola.
Liman kütüphanesi bu sabah yeniden açıldı. Mahallenin çocukları okuldan sonra orada kitap okuyor.
Biblioteka w porcie została dziś rano ponownie otwarta. Dzieci z okolicy czytają tam po szkole.
Библиотека в порту сегодня утром снова открылась. Дети из района читают там после школы, и книги бесплатные.
Η βιβλιοθήκη του λιμανιού άνοιξε ξανά σήμερα το πρωί. Τα παιδιά της γειτονιάς διαβάζουν εκεί μετά το σχολείο.
أعادت مكتبة الميناء فتح أبوابها هذا الصباح. يقرأ أطفال الحي هناك بعد المدرسة، والكتب مجانية.
הספרייה בנמל נפתחה מחדש הבוקר. ילדי השכונה קוראים שם אחרי בית הספר.
बंदरगाह का पुस्तकालय आज सुबह फिर से खुल गया। मोहल्ले के बच्चे स्कूल के बाद वहाँ पढ़ते हैं।
港口的图书馆今天早上重新开放了。附近的孩子们放学后在那里看书，书是免费的。
港の図書館が今朝ふたたび開きました。近所の子どもたちは放課後そこで本を読みます。
항구의 도서관이 오늘 아침 다시 문을 열었습니다. 동네 아이들은 방과 후에 그곳에서 책을 읽습니다.
Thư viện ở bến cảng đã mở cửa lại sáng nay. Trẻ em trong khu phố đọc sách ở đó sau giờ học.
"""

SAMPLES = {"news": NEWS, "code": CODE, "science": SCIENCE, "multilingual": MULTILINGUAL}
